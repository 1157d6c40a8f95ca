"""The levels of a load test as a table in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from gradwire.load_test.levels import Level
from gradwire.load_test.results import LATENCIES, SPLIT

_OPTIONAL = ("optimizer", "recovery", "other")
"""Parts that are shown where there are any."""


def levels_table(levels: Sequence[Level]) -> Table:
    """A line for each level; latencies in milliseconds."""
    has_floor, has_unsent = any(level.floor for level in levels), any(level.measured.unsent for level in levels)
    heads = ["load", "req/s", *LATENCIES, "errors", *(("unsent",) if has_unsent else ())]
    heads += ["floor req/s", "ratio"] if has_floor else []
    table = _table("Requests each second, and their latencies in ms", heads)
    table.add_column("notes")
    for level in levels:
        cells = [str(level.load), f"{level.rate:.1f}"]
        cells += [number(level.latencies_ms[name]) for name in LATENCIES]
        cells.append(str(level.errors))
        if has_unsent:
            cells.append(str(level.measured.unsent))
        if has_floor:
            cells += [number(level.floor.rate if level.floor else None), number(level.ratio)]
        table.add_row(*cells, ", ".join(level.notes))
    return table


def shown_parts(levels: Sequence[Level]) -> list[str]:
    """The parts of a request's time that any level has something to tell of."""
    return [part for part in SPLIT if part not in _OPTIONAL or any(level.split_ms.get(part) for level in levels)]


def split_table(levels: Sequence[Level]) -> Table:
    """Where the mean request's time went, in milliseconds: a line for each level."""
    parts = shown_parts(levels)
    table = _table("Where the mean request's time went, in ms", ["load", *map(title, parts)])
    for level in levels:
        table.add_row(str(level.load), *(number(level.split_ms.get(part)) for part in parts))
    return table


def title(part: str) -> str:
    """A part's name as it is shown."""
    return part.replace("_", "-")


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(box=None, title=title, title_justify="left")
    for name in heads:
        table.add_column(name, justify="left" if name == "load" else "right", no_wrap=True)
    return table


def errors_table(levels: Sequence[Level]) -> Table | None:
    """Errors of all levels by reason; None where there were none."""
    reasons: Counter[str] = Counter()
    for level in levels:
        reasons.update(level.measured.errors)
    if not reasons:
        return None
    table = Table("error", "times", box=None)
    for reason, times in reasons.most_common():
        table.add_row(reason, str(times))
    return table


def line(level: Level) -> str:
    """A level in a line, as soon as it is measured."""
    p99 = number(level.latencies_ms["p99"])
    notes = "".join(f", {note}" for note in level.notes)
    return f"{level.load}: {level.rate:.1f} requests/s, p99 {p99} ms, {level.errors} errors{notes}"


def number(value: float | None) -> str:
    """With three digits, and a dash for none."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
