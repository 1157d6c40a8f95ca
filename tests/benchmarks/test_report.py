"""What `make bench` says of figures, and what it writes. Nothing is timed here."""

from __future__ import annotations

import pytest
import torch
from benchmarks.benchmark import check_device
from benchmarks.report import Report, block, replaced, write
from benchmarks.rows import Row
from benchmarks.timing import in_turn

SLOW = Row(name="steps", figure=0.3141, unit="x local steps/s", at_least=0.6, detail="0.6 ms")
QUICK = Row(name="a call", figure=1.05, unit="x a local step", at_most=1.1)
CURVE = Row(name="a curve", figure=0.5, unit="GiB/s", detail="its points\n 1  2")
PAGE = "# Head\n\n<!-- make bench -->\n<!-- end -->\n\n<!-- make bench-gpu -->\nnone\n<!-- end -->\n"


def test_bar_is_held_on_its_own_side():
    assert [row.cells[2:] for row in (SLOW, QUICK, CURVE)] == [
        ("at least 0.6", "missed"),
        ("at most 1.1", "held"),
        ("", ""),
    ]
    assert Row(name="errors", figure=0, unit="", at_most=0).held
    assert not Row(name="errors", figure=1, unit="", at_most=0).held


def test_missed_bars_and_what_could_not_be_measured_are_counted():
    report = Report(where="here", rows=[SLOW, SLOW, QUICK, CURVE], failed=["load could not be measured"])
    assert report.summary == "1 of 3 bars held, 2 missed; load could not be measured"
    assert "here" in report.as_text() and "0.314 x local steps/s" in report.as_text()


def test_both_pages_get_the_same_table_and_keep_everything_else(tmp_path):
    readme, results = tmp_path / "README.md", tmp_path / "RESULTS.md"
    readme.write_text(PAGE)
    results.write_text(PAGE + "<!-- make bench, details -->\n<!-- end -->\n")
    report = Report(where="here", rows=[SLOW, CURVE])
    for _ in range(2):
        write(report, "make bench", (readme, results))
    table = block(readme.read_text(), "make bench")
    assert table == block(results.read_text(), "make bench") == report.as_markdown()
    assert replaced(readme.read_text(), "make bench", "") == replaced(PAGE, "make bench", "")
    assert "its points\n 1  2" in block(results.read_text(), "make bench, details")


def test_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="substring"):
        replaced(PAGE, "make chaos", "")


def test_calls_take_turns_and_the_first_round_does_not_count():
    order: list[str] = []

    def call(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = in_turn(3, {"local": lambda: call("local"), "remote": lambda: call("remote")})
    assert order == ["remote", "local", "local", "remote", "remote", "local", "local", "remote"]
    assert taken.seconds == {"local": [3.0, 6.0, 7.0], "remote": [4.0, 5.0, 8.0]}
    assert taken.over("remote", "local") == 8.0 / 7.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_rows_say_where_there_is_none():
    with pytest.raises(SystemExit, match="no CUDA device"):
        check_device("cuda")
