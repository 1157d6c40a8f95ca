"""The table of a run: in the terminal, and between markers in RESULTS.md and README.md."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from benchmarks.rows import Row

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
README = ROOT / "README.md"
HEADS = ("what", "figure", "bar", "")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run found, and where. failed: the benchmarks that ended with an error, and the error."""

    where: str
    rows: Sequence[Row]
    failed: Sequence[str] = ()

    @property
    def summary(self) -> str:
        """How many bars were held, and what could not be measured."""
        held = [row.held for row in self.rows if row.held is not None]
        missed = len(held) - sum(held)
        return "; ".join([f"{sum(held)} of {len(held)} bars held, {missed} missed", *self.failed])

    def as_text(self) -> str:
        cells = [HEADS, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        padded = [[f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in cells]
        lines = ["  ".join(row).rstrip() for row in padded]
        return "\n".join([*lines, "", f"{self.where}.", f"{self.summary}."])

    def as_markdown(self) -> str:
        lines = [f"| {' | '.join(row.cells)} |" for row in self.rows]
        head = [f"| {' | '.join(HEADS)} |", "| --- " * len(HEADS) + "|"]
        return "\n".join([f"{self.where}. {self.summary}.", "", *head, *lines])

    def details(self) -> str:
        """What the figures were made of, as a block of Markdown."""
        lines = [f"{row.name}: {row.detail}" for row in self.rows if row.detail]
        return "\n".join(["```", *lines, "```"])


def here() -> str:
    """Machine, versions, date and commit."""
    info = Path("/proc/cpuinfo").read_text()
    model = next(iter(re.findall(r"^model name\s*: (.*)$", info, re.MULTILINE)), platform.machine())
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = f"CPython {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores ({model}){gpu}, {versions}, {datetime.now(UTC):%Y-%m-%d}, commit {commit()}"


def load_average() -> float:
    """How many processes compute, over the last minute: before a run, others' alone."""
    return os.getloadavg()[0]


def busyness(before: float, after: float) -> str:
    """What the load averages before and after a run say of its figures."""
    words = f"load average {before:.1f} before and {after:.1f} after"
    return words + " (busy with other work: these figures say little)" * (before > 1.0)


def commit() -> str:
    """What is checked out, and whether more than the two pages was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    pages = [f":!{path.relative_to(ROOT)}" for path in (README, RESULTS)]
    return git("rev-parse", "--short", "HEAD") + " with changes" * bool(git("status", "--porcelain", "--", ".", *pages))


def write(report: Report, target: str, pages: Sequence[Path] = (README, RESULTS)) -> None:
    """Put the table of `target`, such as "make bench", into both pages, and the details where a page has room."""
    for page in pages:
        text = replaced(page.read_text(), target, report.as_markdown())
        details = f"{target}, details"
        page.write_text(replaced(text, details, report.details()) if _begin(details) in text else text)


def replaced(text: str, name: str, content: str) -> str:
    """The page with other content between the markers of that name. Raises ValueError where it has none."""
    begin, end = _bounds(text, name)
    return f"{text[:begin]}\n{content}\n{text[end:]}"


def block(text: str, name: str) -> str:
    """What a page has between the markers of that name. Raises ValueError where it has none."""
    begin, end = _bounds(text, name)
    return text[begin:end].strip("\n")


def _bounds(text: str, name: str) -> tuple[int, int]:
    begin = text.index(_begin(name)) + len(_begin(name))
    return begin, text.index("<!-- end -->", begin)


def _begin(name: str) -> str:
    return f"<!-- {name} -->"
