"""A model that goes on from a checkpoint is the one that never stopped, bit for bit; its weights are the module's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gradwire_proto.tensors import from_any
from gradwire_proto.values import Batch, OptimizerSpec, ScheduleSpec, StateTensor
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.saved_model import SavedModel

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Tied(nn.Module):
    """Dropout, batch norm, a buffer that no state_dict has, one layer under two names, and more than a MiB of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(10, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.encode = nn.Linear(width, width, bias=False)
        self.decode = self.encode
        self.head = nn.Linear(width, 3)
        self.register_buffer("scratch", torch.zeros(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.drop(self.norm(self.first(x)))
        self.scratch.mul_(0.5).add_(1.0)
        return self.head(self.decode(torch.relu(self.encode(hidden))) + self.scratch)


@pytest.mark.parametrize(("workers", "width"), [(1, 640), (2, 8)])
async def test_model_goes_on_from_a_checkpoint_bit_for_bit(make_spec, start, bits, tmp_path, width, workers):
    torch.manual_seed(width)
    module = Tied(width)
    batches = [(torch.randn(rows, 10), torch.randint(0, 3, (rows,))) for rows in (16, 9, 12, 16, 5)]
    optimizer = OptimizerSpec("AdamW", {"lr": 0.01}, schedule=ScheduleSpec("StepLR", {"step_size": 2}))
    made = make_spec(module, nn.CrossEntropyLoss(), *batches[0], workers=workers, optimizer=optimizer)

    async def train(group: Any, first: int, last: int) -> list[str]:
        losses = []
        for number in range(first, last):
            inputs, targets = map(from_any, batches[number])
            losses.append((await group.train_step(Batch(inputs, targets), command=number + 1)).loss.hex())
        return losses

    undisturbed = await start(made)
    await train(undisturbed, 0, 3)
    inputs, targets = map(from_any, batches[3])
    await undisturbed.forward_backward(Batch(inputs, targets), command=4)
    store = CheckpointStore(str(tmp_path / "checkpoints"), tmp_path / "cache", owner="0123456789abcdef")
    saved = save(made, replace(await undisturbed.state(), command=4), workers)
    store.write("auto/m/4", saved)
    saved.remove_files()
    expected = await train(undisturbed, 4, 5), await finish(undisturbed, bits)
    await undisturbed.close()

    read = store.read("auto/m/4")
    restored = await start(made, state=read.state)
    read.remove_files()
    assert (await train(restored, 4, 5), await finish(restored, bits)) == expected
    assert expected[1]["step"] == 5

    weights = load_file(tmp_path / "checkpoints/auto/0123456789abcdef/m/4/weights.safetensors")
    fresh = Tied(width)
    fresh.load_state_dict(weights, strict=True)
    assert fresh.encode.weight is fresh.decode.weight
    assert all(torch.equal(each, weights[name]) for name, each in fresh.state_dict().items())
    assert not torch.equal(fresh.first.weight, module.first.weight)


async def finish(group: Any, bits: Any) -> dict[str, Any]:
    """Apply the held gradients; what the model is then."""
    await group.optimizer_step(None, lr=None, groups=())
    return bits(await group.state())


def save(made: Any, state: Any, workers: int) -> SavedModel:
    """The checkpoint of a group's state, as its frontend makes it."""
    layout: tuple[StateTensor, ...] = made[0].program.tensors
    return SavedModel(
        name="m/4",
        model_id="m",
        automatic=True,
        created_at=0.0,
        request_id=None,
        spec=b"",
        layout=layout,
        workers=workers,
        state=state,
    )
