"""What was measured stands in the CSV, the JSON and the HTML, each complete by itself."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import pytest
from client.load_test.made_up_levels import level, window

from gradwire.load_test.html_report import as_html
from gradwire.load_test.loads import Load
from gradwire.load_test.options import Options
from gradwire.load_test.results import Results, as_csv, as_json
from gradwire.load_test.tables import errors_table, levels_table, split_table

LOADS = (Load("concurrency", 1), Load("concurrency", 8))
FLOOR = level(LOADS[0], [window([1.0] * 400)])


@pytest.fixture
def results() -> Results:
    first = level(LOADS[0], [window([10.0] * 99 + [500.0])] * 3, floor=FLOOR)
    second = level(LOADS[1], [window([40.0] * 150, QUEUE_FULL=3, NO_ANSWER=1)] * 3, stable=False, floor=FLOOR)
    return Results(
        target="<b>host</b>:1", options=Options(loads=LOADS, floor=True), started=0.0, levels=[first, second]
    )


def test_csv_has_a_line_for_each_level(results: Results) -> None:
    first, second = csv.DictReader(as_csv(results).splitlines())
    assert (first["load"], first["level"], second["level"]) == ("concurrency", "1", "8")
    assert (first["requests_per_second"], first["p50_ms"], first["max_ms"]) == ("100.0", "10.007", "500.0")
    assert (first["queue_ms"], first["compute_ms"], first["other_ms"]) == ("1.0", "2.0", "1.0")
    assert (first["floor_requests_per_second"], first["ratio"]) == ("400.0", "0.25")
    assert (second["errors"], second["errors_by_reason"]) == ("12", "QUEUE_FULL=9 NO_ANSWER=3")
    assert (first["stable"], second["stable"], second["notes"]) == ("True", "False", "unstable")


def test_json_has_options_windows_and_a_histogram_that_gives_any_percentile(results: Results) -> None:
    found = json.loads(as_json(results))
    assert (found["target"], found["started"]) == ("<b>host</b>:1", "1970-01-01T00:00:00+00:00")
    assert found["options"]["loads"] == ["concurrency 1", "concurrency 8"]
    first, second = found["levels"]
    assert [each["requests_per_second"] for each in first["measured_windows"]] == [100.0] * 3
    assert first["histogram_us"] == [[10_007, 297], [500_000, 3]]
    assert second["errors_by_reason"] == {"QUEUE_FULL": 9, "NO_ANSWER": 3}
    assert first["floor"]["requests_per_second"] == 400.0


class Page(HTMLParser):
    """What stands in a page: its text, its elements, and what its attributes refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.words: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_needs_nothing_but_itself_and_shows_figures_and_plots(results: Results) -> None:
    text = as_html(results)
    page = Page(text)
    assert page.open == []
    assert (page.references, "http" in text, "script" in page.elements) == ([], False, False)
    assert "b" not in page.elements and "Load test of <b>host</b>:1" in page.words
    assert page.elements.count("svg") == 5
    for word in ("QUEUE_FULL", "unstable", "bare echo", "p99", "concurrency 8", "all-reduce", "0.25"):
        assert word in page.words, word
    # Service and floor; four percentiles; the distribution of each level, and its windows.
    assert page.elements.count("polyline") == 2 + 4 + 2 + 2
    # What a pointer over a dot shows.
    assert {"service: 100", "service: 150", "bare echo: 400", "p50: 40"} <= set(page.words)


def test_page_of_a_level_without_any_answer_can_be_read() -> None:
    failed = level(LOADS[0], [window([], TIMEOUT=5)], stable=False)
    page = Page(as_html(Results(target="here:1", options=Options(loads=LOADS), started=0.0, levels=[failed])))
    assert page.open == [] and "TIMEOUT" in page.words


def test_tables_show_what_there_is(results: Results) -> None:
    assert [column.header for column in split_table(results.levels).columns][-2:] == ["other", "outside"]
    assert [column.header for column in levels_table(results.levels).columns][-3:] == ["floor req/s", "ratio", "notes"]
    bare = [level(LOADS[0], [window([10.0])])]
    assert "ratio" not in [column.header for column in levels_table(bare).columns]
    assert errors_table(bare) is None


def test_requests_that_were_not_sent_are_shown_where_there_are_any() -> None:
    waiting = window([10.0] * 100)
    waiting.latencies.record(2_000_000, 30)
    waiting.unsent, waiting.unsent_us = 30, 60_000_000
    levels = [level(Load("rate", 40), [waiting])]
    results = Results(target="here:1", options=Options(loads=(Load("rate", 40),)), started=0.0, levels=levels)
    (row,) = csv.DictReader(as_csv(results).splitlines())
    assert (row["requests"], row["unsent"], row["notes"]) == ("100", "30", "not sent")
    assert json.loads(as_json(results))["levels"][0]["unsent"] == 30
    shown = {column.header: list(column.cells) for column in levels_table(levels).columns}
    assert shown["unsent"] == ["30"] and "30" in Page(as_html(results)).words


def test_plots_go_from_left_to_right_whatever_the_order_of_the_sweep() -> None:
    levels = [level(Load("concurrency", value), [window([10.0] * 100)]) for value in (16, 1, 4)]
    text = as_html(Results(target="here:1", options=Options(loads=LOADS), started=0.0, levels=levels))
    curves = re.findall(r'<polyline[^>]* points="([^"]*)"', text)
    across = [[float(point.partition(",")[0]) for point in curve.split()] for curve in curves]
    assert len(across[0]) == 3 and all(places == sorted(places) for places in across)
