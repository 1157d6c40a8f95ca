from __future__ import annotations

import math

from gradwire.terminal_plot import curve


def dots(line: str) -> str:
    return line.split("┤")[1]


def test_curve_is_as_wide_and_high_as_asked():
    lines = curve([math.exp(-step / 40) for step in range(500)], width=30, height=6).split("\n")
    assert len(lines) == 6
    assert max(len(dots(line)) for line in lines) == 30


def test_falling_curve_starts_in_the_top_line_and_ends_in_the_bottom_line():
    lines = curve([3.0, 2.0, 1.0, 0.0], width=10, height=2).split("\n")
    assert lines[0].strip().startswith("3 ┤") and lines[-1].strip().startswith("0 ┤")
    assert ord(dots(lines[0])[0]) & 0x01 == 1
    assert ord(dots(lines[1])[1]) & 0x80 == 0x80


def test_every_column_has_a_dot_and_steep_parts_have_no_gap():
    lines = curve([0.0, 0.0, 1.0, 1.0], width=10, height=3).split("\n")
    second_column_of_dots = sum(bin((ord(dots(line).ljust(2, "⠀")[1]) - 0x2800) & 0x47).count("1") for line in lines)
    assert second_column_of_dots == 12 - 1


def test_constant_values_and_no_values_are_drawn_too():
    assert "┤" in curve([1.0] * 5)
    assert curve([]) == ""


def test_logarithmic_axis_draws_a_falling_exponential_as_a_straight_line():
    lines = curve([10.0 ** (3 - step) for step in range(8)], width=10, height=2, logarithmic=True).split("\n")
    assert lines[0].strip().startswith("1e+03 ┤") and lines[1].strip().startswith("0.0001 ┤")
    straight = curve([float(3 - step) for step in range(8)], width=10, height=2).split("\n")
    assert [dots(line) for line in lines] == [dots(line) for line in straight]
