"""What a benchmark declares: the lines of the table that it measures, each with its bar."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: `figure` in `unit`, the words behind it, such as "of torch's steps/s".

    at_least, at_most: the bar, where there is one. detail: what the figure was made of, in words; curves have lines of
    their own.
    """

    name: str
    figure: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    detail: str = ""

    @property
    def held(self) -> bool | None:
        """Whether the figure is on the right side of the bar; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        return (self.at_least is None or self.figure >= self.at_least) and (
            self.at_most is None or self.figure <= self.at_most
        )

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, figure, bar, and whether it was held."""
        bars = [("at least", self.at_least), ("at most", self.at_most)]
        bar = " and ".join(f"{word} {value:,g}" for word, value in bars if value is not None)
        verdict = {True: "held", False: "missed", None: ""}[self.held]
        return self.name, f"{digits(self.figure)} {self.unit}", bar, verdict

    def __str__(self) -> str:
        name, figure, bar, verdict = self.cells
        words = [f"{name}: {figure}" + (f" (bar: {bar}: {verdict})" if bar else ""), self.detail]
        return "; ".join(filter(None, words))


def digits(figure: float) -> str:
    """Three digits; counts as they are."""
    if isinstance(figure, int) or abs(figure) >= 1000:
        return f"{figure:,.0f}"
    return f"{figure:#.3g}".rstrip(".")
