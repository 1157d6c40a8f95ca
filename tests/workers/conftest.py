"""What the workers' tests share: programs that find torch imported, and a cluster of them without Ray."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch_forks import Fork, TorchForks

from gradwire.export import ModuleExporter
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, ModelSpec, NamedTensors, OptimizerSpec
from gradwire_workers.cluster import Cluster, ClusterConfig
from gradwire_workers.pool.rank_launcher import RankLauncher
from gradwire_workers.worker_group import WorkerGroup


@pytest.fixture(scope="session")
def torch_forks() -> Iterator[TorchForks]:
    """Starts programs that find torch imported."""
    forks = TorchForks()
    yield forks
    forks.close()


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


def spec_of(
    module: torch.nn.Module, loss: Any, inputs: Any, targets: Any = None, **changes: Any
) -> tuple[ModelSpec, NamedTensors, Batch]:
    """(spec, tensors, example) as CreateModel brings them. SGD with momentum, unless told otherwise."""
    exported = ModuleExporter(module, loss).export_model(inputs, targets)
    settings = {"optimizer": OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}), "device": "cpu", **changes}
    tensors = {name: from_any(tensor) for name, tensor in exported.tensors.items()}
    example = Batch(from_nested(exported.example.inputs), from_nested(exported.example.targets))
    return ModelSpec(program=exported.program, loss=exported.loss, **settings), tensors, example


def batch_of(inputs: Any, targets: Any = None) -> Batch:
    """Tensors as they come from the wire."""
    return Batch(from_nested(inputs), from_nested(targets))


Start = Callable[..., Awaitable[WorkerGroup]]


@pytest_asyncio.fixture(loop_scope="session")
async def start(cluster: Cluster) -> AsyncIterator[Start]:
    """Starts worker groups: `await start(module, loss, inputs, targets, workers=2)`. They end with the test."""
    groups: list[WorkerGroup] = []

    async def start(*arguments: Any, **changes: Any) -> WorkerGroup:
        groups.append(await cluster.start_group(*spec_of(*arguments, **changes), model_id="m"))
        return groups[-1]

    yield start
    for group in groups:
        await group.close()


@pytest.fixture
def in_batch() -> Callable[..., Batch]:
    """Makes batches of the wire's tensors."""
    return batch_of


@pytest.fixture
def specify() -> Callable[..., tuple[ModelSpec, NamedTensors, Batch]]:
    """Makes what `Cluster.start_group` takes."""
    return spec_of
