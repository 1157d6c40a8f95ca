"""Curves in a terminal, drawn with braille dots."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import log

# Bit of each dot in a braille character, by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def curve(values: Sequence[float], *, width: int = 72, height: int = 10, logarithmic: bool = False) -> str:
    """A curve of `values` in `height` lines of at most `width` characters, the axis on its left not counted.

    More values than dots: each dot stands for the mean of its part. Values must be finite, and positive for a
    logarithmic axis; none gives an empty string.
    """
    if not values:
        return ""
    columns, rows = min(2 * width, len(values)), 4 * height
    cuts = [index * len(values) // columns for index in range(columns + 1)]
    means = [sum(values[start:stop]) / (stop - start) for start, stop in pairwise(cuts)]
    heights = [log(mean) for mean in means] if logarithmic else means
    low, high = min(heights), max(heights)
    levels = [round((high - value) / ((high - low) or 1.0) * (rows - 1)) for value in heights]
    cells = [[0] * -(-columns // 2) for _ in range(height)]
    for column, level in enumerate(levels):
        # Up to the neighbour's level, so that steep parts stay one line.
        before = levels[max(0, column - 1)]
        start, stop = sorted((level, before + (level > before) - (level < before) if column else level))
        for row in range(start, stop + 1):
            cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]
    labels = {0: f"{max(means):.3g}", height - 1: f"{min(means):.3g}"}
    return "\n".join(
        f"{labels.get(line, ''):>9} ┤{''.join(chr(0x2800 + cell) for cell in row).rstrip(chr(0x2800))}"
        for line, row in enumerate(cells)
    )
