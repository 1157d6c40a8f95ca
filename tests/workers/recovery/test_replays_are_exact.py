"""Commands that are applied once more give the same bits: nothing in them depends on time, nor on what was read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import (
    ArchitectureSpec,
    Batch,
    GradientQuery,
    ModelSpec,
    OptimizerSpec,
    OutputLossSpec,
    TorchLossSpec,
)
from gradwire_workers import variant_splits

pytestmark = pytest.mark.asyncio(loop_scope="session")


def architecture() -> Any:
    """(spec, tensors, example) of a small classifier on two ranks, whose example has classes as targets."""
    torch.manual_seed(7)
    layers = [
        {"name": "torch.nn.Linear", "config": {"in_features": 10, "out_features": 16}},
        {"name": "torch.nn.Tanh", "config": {}},
        {"name": "torch.nn.Linear", "config": {"in_features": 16, "out_features": 3}},
    ]
    spec = ModelSpec(
        program=ArchitectureSpec(name="torch.nn.Sequential", config={"layers": layers}),
        loss=TorchLossSpec("cross_entropy"),
        optimizer=OptimizerSpec("SGD", {"lr": 0.1}),
        device="cpu",
        seed=3,
        workers=2,
    )
    return spec, {}, Batch(from_any(torch.randn(12, 10)), from_any(torch.randint(0, 3, (12,))))


def soft_batch(rows: int) -> Batch:
    """A batch with probabilities as targets: of a kind that the example is not."""
    return Batch(from_any(torch.randn(rows, 10)), from_any(torch.randn(rows, 3).softmax(1)))


async def train(group: Any, batches: list[Batch], splits: Any = None) -> list[tuple[str, tuple[int, ...]]]:
    """Train on these; (loss, rows of each rank) of each step. splits: what a journal says of the first."""
    found = []
    for number, batch in enumerate(batches, 1):
        group.expect(splits or {})
        splits = None
        result = await group.train_step(batch, command=number)
        found.append((result.loss.hex(), result.rank_rows))
    return found


@pytest.mark.parametrize("late", ["at first", "once more"])
async def test_variant_that_a_command_opens_is_split_as_before_however_long_ranks_take_to_try(
    start, bits, monkeypatch, late
):
    made = architecture()
    batches = [soft_batch(31) for _ in range(3)]
    first = await start(made)
    before = first.splits
    with monkeypatch.context() as patch:
        if late == "at first":
            patch.setattr(variant_splits.TrialTime.__init__, "__defaults__", (0.0,))
        expected = await train(first, batches)
    splits = {name: each for name, each in first.splits.items() if name not in before}
    assert [each.whole is None for each in splits.values()] == [late == "once more"]
    last = bits(await first.state())
    await first.close()
    again = await start(made)
    if late == "once more":
        monkeypatch.setattr(variant_splits.TrialTime.__init__, "__defaults__", (0.0,))
    assert await train(again, batches, splits) == expected
    assert bits(await again.state()) == last


class MayScale(nn.Module):
    """Returns its loss, a mean over the targets that count."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        logits = self.linear(x) if scale is None else self.linear(x) * scale
        return nn.functional.cross_entropy(logits, y, ignore_index=2)


async def test_graph_that_is_added_again_weighs_its_loss_as_was_found_and_tries_nothing(
    start, bits, make_spec, monkeypatch
):
    torch.manual_seed(7)
    module = MayScale()

    plain = [{"x": torch.randn(rows, 10), "y": torch.arange(rows) % 5 % 3} for rows in (12, 7, 9)]
    scaled = [{**each, "scale": torch.rand(len(each["x"]), 1)} for each in plain]
    spec, *rest = make_spec(module, None, plain[0], workers=2)
    made = (replace(spec, loss=OutputLossSpec(0)), *rest)
    added = ModuleExporter(module, None).export_variant(scaled[0], training=True, name="scaled")

    async def run(group: Any, splits: Any) -> Any:
        group.expect(splits)
        await group.add_variant(
            added.variant,
            tensors=added.tensors,
            values={name: from_any(value) for name, value in added.values.items()},
            operators=added.operators,
            example=Batch(from_nested(scaled[0])),
        )
        return await train(group, [Batch(from_nested(each)) for each in scaled]), bits(await group.state())

    first = await start(made)
    expected = await run(first, {})
    splits = {"scaled": first.splits["scaled"]}
    assert splits["scaled"].whole is None and splits["scaled"].weight is not None
    await first.close()
    again = await start(made)
    monkeypatch.setattr(variant_splits.TrialTime.__init__, "__defaults__", (0.0,))
    assert await run(again, splits) == expected


async def test_what_was_only_read_leaves_commands_as_they_are_without_it(start, bits):
    made = architecture()
    batches = [soft_batch(rows) for rows in (31, 2, 16)]
    undisturbed = await start(made)
    expected = await train(undisturbed, batches)
    last = bits(await undisturbed.state())
    await undisturbed.close()
    read = await start(made)
    before = read.splits
    # Ten rows, and ten columns: looked at alone, this batch's sizes are one.
    await read.compute_gradients(soft_batch(10), GradientQuery())
    await read.compute_gradients(soft_batch(10), GradientQuery())
    assert read.splits == before
    assert [each.name for each in read.variants] == list(before)
    assert await train(read, batches) == expected
    assert bits(await read.state()) == last
