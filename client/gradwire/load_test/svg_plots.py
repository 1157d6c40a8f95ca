"""Plots as SVG, to stand in an HTML page: lines over a numeric axis, and stacked bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#2563eb", "#16a34a", "#d97706", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 130, 30, 44

Points = Sequence[tuple[float, float]]


def lines(
    title: str, series: Mapping[str, Points], *, x: str, y: str, x_ticks: Mapping[float, str] | None = None
) -> str:
    """A line with dots for each series. x_ticks: what stands below the axis, by place; numbers where left out."""
    everything = [point for points in series.values() for point in points]
    if not everything:
        return ""
    places = list(x_ticks or ()) or [point[0] for point in everything]
    low, high = min(places), max(places)
    top = max(point[1] for point in everything) or 1.0
    ticks = x_ticks if x_ticks is not None else {value: f"{value:g}" for value in sorted({*places})}

    def at(point: tuple[float, float]) -> tuple[float, float]:
        return _across((point[0] - low) / ((high - low) or 1.0)), _up(point[1] / top)

    parts = [_axes(title, x, y, top)]
    parts += _apart([(at((place, 0))[0], text) for place, text in ticks.items()])
    for index, (name, points) in enumerate(series.items()):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{across:.1f},{up:.1f}" for across, up in map(at, points))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>')
        if len(points) <= 40:
            parts += [_dot(*at(point), colour, f"{name}: {point[1]:.4g}") for point in points]
        parts.append(_legend(index, name, colour))
    return _svg(title, parts)


def stacked_bars(title: str, bars: Mapping[str, Mapping[str, float]], *, x: str, y: str) -> str:
    """A bar for each name, made of its parts, the first at the bottom."""
    names = list(dict.fromkeys(part for parts in bars.values() for part in parts))
    top = max((sum(parts.values()) for parts in bars.values()), default=0.0)
    if not top:
        return ""
    pieces, step = [_axes(title, x, y, top)], 1 / len(bars)
    for index, (name, parts) in enumerate(bars.items()):
        left, right, height = _across((index + 0.2) * step), _across((index + 0.8) * step), 0.0
        for part, value in parts.items():
            upper, lower = _up((height + value) / top), _up(height / top)
            colour = COLOURS[names.index(part) % len(COLOURS)]
            tip = escape(f"{name}, {part}: {value:.4g}")
            pieces.append(
                f'<rect x="{left:.1f}" y="{upper:.1f}" width="{right - left:.1f}" height="{lower - upper:.1f}"'
                f' fill="{colour}"><title>{tip}</title></rect>'
            )
            height += value
        pieces.append(_tick((left + right) / 2, name))
    pieces += [_legend(index, name, COLOURS[index % len(COLOURS)]) for index, name in enumerate(names)]
    return _svg(title, pieces)


def _across(part: float) -> float:
    return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)


def _up(part: float) -> float:
    return _HEIGHT - _BOTTOM - part * (_HEIGHT - _TOP - _BOTTOM)


def _svg(title: str, parts: Sequence[str]) -> str:
    label = escape(title, quote=True)
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _axes(title: str, x: str, y: str, top: float) -> str:
    middle = (_across(0) + _across(1)) / 2
    parts = [
        f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>',
        f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>',
        f'<text x="14" y="{_up(0.5)}" text-anchor="middle" transform="rotate(-90 14 {_up(0.5)})">{escape(y)}</text>',
    ]
    step = _round_step(top)
    for index in range(int(top / step) + 1):
        height = _up(index * step / top)
        parts.append(f'<line x1="{_across(0)}" x2="{_across(1)}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{index * step:.4g}</text>')
    return "".join(parts)


def _round_step(top: float) -> float:
    """A step of 1, 2 or 5 times a power of ten, at most six of which fit."""
    power = 10.0 ** math.floor(math.log10(top / 5))
    return next(factor * power for factor in (1, 2, 5, 10) if top / (factor * power) <= 6)


def _apart(ticks: Sequence[tuple[float, str]]) -> list[str]:
    """Ticks from left to right, without those that would run into the one before."""
    shown, free = [], 0.0
    for across, text in ticks:
        if across >= free:
            shown.append(_tick(across, text))
            free = across + 8 * len(text) + 8
    return shown


def _tick(across: float, text: str) -> str:
    return f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def _dot(across: float, up: float, colour: str, tip: str) -> str:
    return f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3" fill="{colour}"><title>{escape(tip)}</title></circle>'


def _legend(index: int, name: str, colour: str) -> str:
    left, top = _WIDTH - _RIGHT + 12, _TOP + 18 * index
    swatch = f'<rect x="{left}" y="{top}" width="10" height="10" fill="{colour}"/>'
    return f'{swatch}<text x="{left + 16}" y="{top + 9}">{escape(name)}</text>'
