"""What a load test is told is checked before anything starts, and refused by the option's name."""

from __future__ import annotations

from typing import Any

import pytest

from gradwire.errors import InvalidArgument
from gradwire.load_test.loads import Load, parse_loads
from gradwire.load_test.options import Options, parse_layers

ONE = (Load("concurrency", 1),)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("8", [8]),
        ("1,4,16", [1, 4, 16]),
        ("1:4", [1, 2, 3, 4]),
        ("1:16:5", [1, 6, 11, 16]),
        ("1:16:2", [1, 3, 5, 7, 9, 11, 13, 15]),
        ("3:3:1", [3]),
    ],
)
def test_levels_are_a_number_a_list_or_a_range(text: str, values: list[int]) -> None:
    assert [load.value for load in parse_loads("concurrency", text)] == values


def test_rates_may_be_fractions_and_their_range_hits_its_end() -> None:
    assert [load.value for load in parse_loads("rate", "0.1:0.3:0.1")] == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("concurrency", "many"),
        ("concurrency", ""),
        ("concurrency", "1:2:3:4"),
        ("concurrency", "4:1"),
        ("concurrency", "1:4:0"),
        ("concurrency", "1:1e9"),
        ("concurrency", "0"),
        ("concurrency", "1.5"),
        ("rate", "0"),
        ("rate", "nan"),
        ("rate", "1:inf:1"),
        ("rate", "100001"),
        ("concurrency", "100000,1e9"),
    ],
)
def test_levels_that_are_none_are_refused(kind: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_loads(kind, text)
    assert (refused.value.field, refused.value.reason) == (f"--{kind}", "LOAD_INVALID")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"arrivals": "gamma"}, "--arrivals"),
        ({"method": "hvp"}, "--method"),
        ({"models": 0}, "--models"),
        ({"workers": 0}, "--workers"),
        ({"clients": 0}, "--clients"),
        ({"batch": 0}, "--batch"),
        ({"max_windows": 0}, "--max-windows"),
        ({"window": 0.0}, "--window"),
        ({"timeout": float("inf")}, "--timeout"),
        ({"stable": 0.0}, "--stable"),
        ({"warm_up": -1.0}, "--warm-up"),
        ({"layers": (4,)}, "--layers"),
        ({"layers": (4, 0, 2)}, "--layers"),
        ({"percentile": 101.0}, "--percentile"),
        ({"latency_limit": 0.0}, "--latency-limit"),
        ({"search": True}, "--search"),
        ({"search": True, "latency_limit": 5.0, "loads": (Load("rate", 2), Load("rate", 1))}, "--search"),
        ({"model_ids": ("mine",), "method": "train_step"}, "--method"),
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        Options(**{"loads": ONE, **wrong})
    assert refused.value.field == field


def test_layers_are_whole_numbers() -> None:
    assert parse_layers("784,1024,10") == (784, 1024, 10)
    with pytest.raises(InvalidArgument) as refused:
        parse_layers("784,big")
    assert refused.value.field == "--layers"
