"""A model that was trained under larger limits than there are now: it comes back, and is bounded from then on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gradwire_proto.errors import GradwireError
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import (
    ArchitectureSpec,
    Batch,
    Limits,
    ModelSpec,
    OptimizerSpec,
    Retention,
    TorchLossSpec,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")


def batch(rows: int = 64) -> Batch:
    torch.manual_seed(0)
    return Batch(from_nested(torch.randn(rows, 10)), from_nested(torch.randint(0, 3, (rows,))))


def graphs(make: Any) -> Any:
    """A model on one rank, of 132 bytes in two tensors."""
    return make(nn.Linear(10, 3), nn.CrossEntropyLoss(), torch.randn(4, 10), torch.randint(0, 3, (4,)), workers=1)


async def train(group: Any, command: int) -> float:
    return (await group.train_step(batch(), command=command)).loss


@pytest.fixture
def lowered(cluster, monkeypatch):
    """Gives the cluster other limits."""

    def lower(**limits: Any) -> None:
        monkeypatch.setattr(cluster, "_config", replace(cluster._config, limits=Limits(**limits)))

    return lower


async def test_model_and_its_commands_that_are_larger_than_may_be_now_are_the_same_again(
    start, cluster, make_spec, lowered, bits
):
    made = graphs(make_spec)
    first = await start(made)
    state = await first.state()
    losses = [await train(first, 1), await train(first, 2)]
    lowered(tensor_bytes=100)
    with pytest.raises(GradwireError, match="tensor_bytes"):
        await cluster.start_group(made[0], state.tensors, None, model_id="m", state=state)
    again = await cluster.start_group(made[0], state.tensors, None, model_id="m", state=state, again=True)
    try:
        with again.without_limits():
            assert [await train(again, 1), await train(again, 2)] == losses
        assert bits(await again.state()) == bits(await first.state())
        with pytest.raises(GradwireError, match="tensor_bytes"):
            await train(again, 3)
    finally:
        await again.close()


async def test_forwards_that_are_more_than_may_be_retained_now_are_retained_again(
    start, cluster, make_spec, lowered, drop
):
    made = graphs(make_spec)
    state = await (await start(made)).state()
    lowered(retained_bytes=1)
    again = await cluster.start_group(made[0], state.tensors, None, model_id="m", state=state, again=True)
    forward = (from_any(torch.randn(8, 10)), Retention())
    try:
        with again.without_limits():
            assert (await again.retained.forward(*forward, "a", training=True, seed=None, command=1)).retained == "a"
        with pytest.raises(GradwireError, match="retained_bytes"):
            await again.retained.forward(*forward, "b", training=True, seed=None, command=2)
    finally:
        await again.close()
        drop(state)


async def test_kinds_of_batches_of_which_there_are_more_than_may_be_now_are_taken_again(start, cluster, lowered, drop):
    spec = ModelSpec(
        program=ArchitectureSpec(name="torch.nn.Linear", config={"in_features": 10, "out_features": 3}),
        loss=TorchLossSpec("cross_entropy"),
        optimizer=OptimizerSpec("SGD", {"lr": 0.1}),
        device="cpu",
        workers=1,
    )
    state = await (await start((spec, {}, batch()))).state()
    lowered(variants=len(state.opened))
    soft = Batch(from_any(torch.randn(8, 10)), from_any(torch.randn(8, 3).softmax(1)))
    other = Batch(from_any(torch.randn(8, 2, 10)), from_any(torch.randn(8, 2, 3).softmax(1)))
    again = await cluster.start_group(spec, state.tensors, None, model_id="m", state=state, again=True)
    try:
        with again.without_limits():
            await again.train_step(soft, command=1)
        with pytest.raises(GradwireError, match="setting variants"):
            await again.train_step(other, command=2)
    finally:
        await again.close()
        drop(state)
