"""Which sizes of its inputs and targets a variant leaves open, and between which bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import nn
from torch.nn import functional as F

from gradwire.export import ModuleExporter
from gradwire.exporting.size_box import equal_symbols, largest_box
from gradwire_proto.values import Symbol, TensorSpec, Variant


class Forward(nn.Module):
    """A module whose forward is a function of it and its inputs."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def variant(function: Callable[..., Any], inputs: Any, targets: Any = None, loss: Any = None, **given: Any) -> Variant:
    return ModuleExporter(Forward(function), loss, **given).export_model(inputs, targets).program.variants[0]


def shapes(leaves: Any) -> list[tuple[int | str, ...]]:
    return [leaf.shape for leaf in leaves if isinstance(leaf, TensorSpec)]


def test_sizes_that_the_module_makes_equal_are_one_symbol():
    found = variant(lambda m, x, y: m.linear(x + y), (torch.randn(5, 3, 4), torch.randn(5, 3, 4)))
    assert shapes(found.input_leaves) == [("rows", "size_1", 4), ("rows", "size_1", 4)]
    assert found.symbols == (Symbol("rows", min=1), Symbol("size_1", min=2))


def test_sizes_that_nothing_ties_are_symbols_of_their_own():
    found = variant(lambda m, x, y: (x.sum(1), y.sum(1)), (torch.randn(5, 3), torch.randn(5, 3)))
    assert shapes(found.input_leaves) == [("rows", "size_1"), ("rows", "size_1_2")]


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda m, x: x.unflatten(1, (x.shape[1] // 2, 2)).sum(2), (5, 6)),
        (lambda m, x: x.flatten(1) @ x.new_ones(12, 2), (5, 4, 3)),
        (lambda m, x: m.linear(x), (5, 4)),
        (lambda m, x: x.sum(1), (5, 1)),
        (lambda m, x: x.sum(1), (5, 0)),
    ],
    ids=["even lengths alone", "a product is fixed", "a weight's size", "one", "none"],
)
def test_what_bounds_cannot_say_stays_as_in_the_example(forward: Any, shape: tuple[int, ...]):
    found = variant(forward, torch.randn(shape))
    assert shapes(found.input_leaves) == [("rows", *shape[1:])]
    assert found.symbols == (Symbol("rows", min=1),)


def test_a_size_that_follows_from_another_fixes_both():
    found = variant(lambda m, x, y: x[:, 1:] + y, (torch.randn(5, 6), torch.randn(5, 5)))
    assert shapes(found.input_leaves) == [("rows", 6), ("rows", 5)]


def test_where_module_and_graph_differ_at_other_sizes_they_are_fixed():
    def forward(m, x):
        # As an export sees it, the length is a number.
        return x * (6 if torch.compiler.is_exporting() else x.shape[1])

    found = variant(forward, torch.randn(5, 6))
    assert shapes(found.input_leaves) == [("rows", 6)]


@pytest.mark.parametrize("write", ["{}".format, str, lambda size: f"{size}"])
def test_sizes_that_are_written_as_text_are_fixed(write: Callable[[Any], str]):
    # Neither the smallest length nor a larger one is in the table: trying shows nothing.
    lengths = variant(lambda m, x: x * {"4": 3.0}.get(write(x.shape[1]), 1.0), torch.randn(5, 6))
    assert shapes(lengths.input_leaves) == [("rows", 6)]
    rows = variant(lambda m, x: m.linear(x) * {"9": 3.0}.get(write(x.shape[0]), 1.0), torch.randn(5, 4))
    assert shapes(rows.input_leaves) == [(5, 4)]
    half = variant(lambda m, x: x * {"2.0": 3.0}.get(write(x.shape[1] / 2), 1.0), torch.randn(5, 6))
    assert shapes(half.input_leaves) == [("rows", 6)]


def test_a_size_at_which_the_module_alone_fails_is_none_of_the_graphs():
    def forward(m, x):
        if not torch.compiler.is_exporting() and x.shape[1] > 6:
            raise ValueError("too long")
        return x * 2

    assert variant(forward, torch.randn(5, 6)).symbols[1:] == (Symbol("size_1", min=2, max=6),)


@pytest.mark.parametrize(
    ("loss", "targets", "expected"),
    [
        ("mse", torch.randn(5, 6, 4), ("rows", "size_1", 4)),
        (lambda o, t: F.cross_entropy(o.transpose(1, 2), t), torch.randint(4, (5, 6)), ("rows", "size_1")),
        (lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), torch.randint(4, (5, 6)), ("rows", "size_1")),
        (lambda o, t: (o.mean((1, 2)) - t.mean(1)).square().mean(), torch.randn(5, 3), ("rows", "size_1_2")),
    ],
    ids=["by name", "transposed", "flattened", "a length of its own"],
)
def test_targets_share_the_symbols_of_what_the_loss_compares_them_with(loss: Any, targets: Any, expected: Any):
    found = variant(lambda m, x: m.linear(x), torch.randn(5, 6, 4), targets, loss)
    assert shapes(found.input_leaves) == [("rows", "size_1", 4)]
    assert shapes(found.target_leaves) == [expected]


def test_a_loss_that_needs_a_length_fixes_it():
    ramp = torch.arange(6.0)
    found = variant(
        lambda m, x: m.linear(x),
        torch.randn(5, 6, 4),
        torch.randn(5, 6),
        lambda o, t: ((o.sum(2) - t) * ramp).square().mean(),
    )
    assert shapes(found.input_leaves) == [("rows", 6, 4)] and shapes(found.target_leaves) == [("rows", 6)]


@pytest.mark.parametrize(
    ("loss_weight", "length"),
    [
        (lambda x, t: (t != -100).sum(), "size_1"),
        (lambda x, t: (t != -100).sum() + (0 if torch.compiler.is_exporting() else t.shape[1] - 6), 6),
    ],
    ids=["right", "wrong at other lengths"],
)
def test_loss_weight_is_held_to_other_lengths_too(loss_weight: Any, length: int | str):
    found = variant(
        lambda m, x: m.linear(x),
        torch.randn(5, 6, 4),
        torch.randint(4, (5, 6)),
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
        loss_weight=loss_weight,
    )
    assert shapes(found.target_leaves) == [("rows", length)]


def test_bounds_are_as_wide_as_every_guard_allows():
    a, b, rows = sympy.symbols("a b rows", integer=True, positive=True)
    open_above = {a: (2, None), b: (2, None), rows: (2, None)}
    assert largest_box([sympy.Ne(a - 2, 1), a <= 40], open_above, {a: 8, b: 5}) == {**open_above, a: (4, 40)}
    assert largest_box([sympy.Eq(a % 2, 0)], open_above, {a: 8, b: 5}) == {**open_above, a: (8, 8)}
    assert largest_box([sympy.Eq(rows * a, 6)], open_above, {a: 3, b: 5}) is None
    box = largest_box([a * b <= 100], open_above, {a: 8, b: 5})
    assert box is not None and box[a] == (2, 20) and box[b] == (2, 5)


def test_symbols_that_a_guard_makes_equal_are_found():
    a, b, rows = sympy.symbols("a b rows", integer=True, positive=True)
    assert equal_symbols([sympy.Eq(rows * a, rows * b)], {a: 6, b: 6}) == {a: b}
    assert equal_symbols([sympy.Eq(rows * a, 2 * b)], {a: 6, b: 6}) == {}
