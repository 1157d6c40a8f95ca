"""A cluster whose ranks are plain processes: all of the workers' side but Ray."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import nn
from torch_forks import Fork, TorchForks

from gradwire.export import ModuleExporter
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, ModelSpec, ModelState, NamedTensors, OptimizerSpec, Segment, TensorData, leaves
from gradwire_workers.cluster import Cluster, ClusterConfig
from gradwire_workers.pool.rank_launcher import RankLauncher
from gradwire_workers.segments import pieces
from gradwire_workers.worker_group import WorkerGroup

torch.set_num_threads(1)


class PlainProcesses:
    """In place of Ray. `answers` False: what Ray is asked to end, it does not, and takes its time not to."""

    def __init__(self, forks: TorchForks) -> None:
        self.processes: dict[str, Fork] = {}
        self.answers = True
        self._forks = forks

    def join(self) -> None: ...

    def leave(self) -> None: ...

    def totals(self) -> tuple[int, float]:
        return 3, 0.0

    def kill_orphans(self) -> int:
        while self.processes:
            self.processes.popitem()[1].close()
        return 0

    def start_rank(self, name: str, folder: str, memory_folder: str, *, patience: float) -> dict[str, Any]:
        endpoint = f"ipc://{folder}/{name}.sock"
        process = self._forks.start(Path(__file__).with_name("rank.py"), endpoint, memory_folder, name)
        self.processes[name] = process
        assert process.output.readline() == "serving\n"
        return {"endpoint": endpoint, "process_id": process.pid}

    def kill(self, name: str) -> None:
        if not self.answers:
            time.sleep(8)
            return
        self.processes[name].kill()

    def reserve(self, ranks: int, gpus_per_rank: float, *, timeout: float) -> Any:
        return _Reservation()

    def free(self, reservation: Any) -> None:
        if not self.answers:
            time.sleep(8)


class _Reservation:
    gpu_ids = ()


@pytest.fixture(scope="session")
def plain_processes(torch_forks: TorchForks) -> PlainProcesses:
    """What starts and ends the ranks of the cluster."""
    return PlainProcesses(torch_forks)


@pytest.fixture(scope="session")
def memory_folder() -> Iterator[Path]:
    """A folder in shared memory."""
    folder = Path(tempfile.mkdtemp(prefix="gradwire-test-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def cluster(plain_processes: PlainProcesses, memory_folder: Path) -> AsyncIterator[Cluster]:
    """Three ranks for models, and as many warm."""
    folder = tempfile.mkdtemp(prefix="gw-", dir="/tmp")
    config = ClusterConfig(
        address="", namespace="", folder=folder, memory_folder=str(memory_folder), workers=3, threads_per_rank=1
    )
    placement: Any = plain_processes
    launcher = RankLauncher(placement, folder=folder, memory_folder=str(memory_folder))
    cluster = Cluster(config, placement, launcher)
    await cluster._join()
    yield cluster
    await cluster.close()
    shutil.rmtree(folder)


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
