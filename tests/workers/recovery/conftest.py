"""Models that are lost and come back, compared bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, ModelSpec, ModelState, NamedTensors, OptimizerSpec, Segment, TensorData, leaves
from gradwire_workers.cluster import Cluster
from gradwire_workers.segments import pieces
from gradwire_workers.worker_group import WorkerGroup

torch.set_num_threads(1)


Made = tuple[ModelSpec, NamedTensors, Batch]


def specify(module: nn.Module, loss: Any, inputs: Any, targets: Any = None, **changes: Any) -> Made:
    """(spec, tensors, example) as CreateModel brings them. SGD with momentum, unless told otherwise."""
    exported = ModuleExporter(module, loss, changes.get("precision", "fp32")).export_model(inputs, targets)
    settings = {"optimizer": OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}), "device": "cpu", **changes}
    tensors = {name: from_any(tensor) for name, tensor in exported.tensors.items()}
    example = Batch(from_nested(exported.example.inputs), from_nested(exported.example.targets))
    return ModelSpec(program=exported.program, loss=exported.loss, **settings), tensors, example


@pytest.fixture
def make_spec() -> Callable[..., Made]:
    """`make_spec(module, loss, inputs, targets, workers=2)`."""
    return specify


def in_bits(value: Any) -> Any:
    """Every leaf of a nested value, tensors as their bytes, floats as theirs."""
    found = {}
    for path, leaf in leaves(value):
        if isinstance(leaf, TensorData):
            data = b"".join(bytes(each) for each in pieces(leaf.data))
            found[path] = (leaf.dtype, tuple(leaf.shape), data)
        else:
            found[path] = leaf.hex() if isinstance(leaf, float) else leaf
    return found


def state_in_bits(state: ModelState) -> dict[str, Any]:
    """All that a state holds, comparable. Its files are removed."""
    told = {
        "tensors": in_bits(dict(state.tensors)),
        "optimizer": in_bits(state.optimizer),
        "held": [None if each is None else in_bits(each) for each in state.held],
        "step": state.step,
        "trained": state.trained,
        "splits": dict(state.splits),
        "opened": [each.name for each in state.opened],
    }
    drop_files(state)
    return told


def drop_files(state: ModelState) -> None:
    """Unlinks the segments of a state."""
    for _, leaf in leaves([dict(state.tensors), state.optimizer, list(state.held)]):
        if isinstance(leaf, TensorData) and isinstance(leaf.data, Segment):
            with suppress(FileNotFoundError):
                os.unlink(leaf.data.path)


@pytest.fixture
def bits() -> Callable[[ModelState], dict[str, Any]]:
    """A state as values that can be compared. Removes its files."""
    return state_in_bits


@pytest.fixture
def drop() -> Callable[[ModelState], None]:
    """Removes a state's files."""
    return drop_files


@pytest_asyncio.fixture(loop_scope="session")
async def start(cluster: Cluster) -> AsyncIterator[Callable[..., Any]]:
    """`await start(made, state=None)`: a worker group, which ends with the test."""
    groups: list[WorkerGroup] = []

    async def start(made: Made, *, state: ModelState | None = None) -> WorkerGroup:
        spec, tensors, example = made
        if state is None:
            groups.append(await cluster.start_group(spec, tensors, example, model_id="m"))
        else:
            groups.append(await cluster.start_group(spec, state.tensors, None, model_id="m", state=state))
        return groups[-1]

    yield start
    for group in groups:
        await group.close()


@pytest.fixture
def process_ids() -> Callable[[WorkerGroup], list[int]]:
    """The processes of a group's ranks, by rank."""
    return lambda group: [each.process_id for each in group._ranks.processes]


@pytest.fixture
def send() -> Callable[[int, signal.Signals], None]:
    """Sends a signal to a process."""
    return os.kill
