"""Ranks in processes of their own, without Ray, driven as a worker group drives them."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_forks import Fork, TorchForks

from gradwire.export import ModuleExporter
from gradwire_proto.batch_check import flatten, select_variant
from gradwire_proto.errors import GradwireError
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import (
    Batch,
    GradientQuery,
    LossSpec,
    ModelSpec,
    OptimizerSpec,
    TensorData,
    TorchLossSpec,
    unflatten,
)
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import combine_leaves, split

torch.set_num_threads(1)


class RankProcesses:
    """Processes that wait to be ranks; more are started as tests need them."""

    def __init__(self, folder: Path, forks: TorchForks) -> None:
        self.folder = folder
        self._forks = forks
        self._listener = Listener(str(folder / "ranks"), family="AF_UNIX")
        self._processes: list[Fork] = []
        self.connections: list[Connection] = []
        self._generation = 0

    def new_generation(self) -> int:
        self._generation += 1
        return self._generation

    def grow(self, size: int) -> None:
        while len(self.connections) < size:
            script = Path(__file__).parent / "rank_process.py"
            self._processes.append(self._forks.start(script, str(self._listener.address)))
            self.connections.append(self._listener.accept())

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def call(self, name: str, each: list[tuple[tuple, dict]], *, without: int | None = None) -> list[tuple[str, Any]]:
        """Call the first len(each) ranks at once, but not rank `without`; wait for all answers."""
        used = [each for rank, each in enumerate(zip(self.connections, each, strict=False)) if rank != without]
        for connection, (arguments, keywords) in used:
            connection.send_bytes(pickle.dumps((name, arguments, keywords)))
        return [pickle.loads(connection.recv_bytes()) for connection, _ in used]

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self._listener.close()
        for process in self._processes:
            process.close()


class Group:
    """The ranks of one model: what WorkerGroup does, in a few blocking lines."""

    def __init__(
        self,
        processes: RankProcesses,
        spec: ModelSpec,
        tensors: dict[str, Tensor],
        example: Batch,
        seconds: float = float("inf"),
    ) -> None:
        self.processes, self.spec, self.size = processes, spec, spec.workers
        self.variants = list(spec.program.variants)
        self.command = 0
        self.reports: list[Any] = []
        self.whole: dict[str, str | None] = {}
        self.loss: dict[str, str | None] = {}
        self.reports_of: dict[str, Any] = {}
        processes.grow(self.size)
        generation = processes.new_generation()
        folder = str(processes.folder)
        state = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.call("start", [((spec, state, rank, self.size, folder, generation), {}) for rank in range(self.size)])
        for variant in self.variants:
            self.whole[variant.name] = None
            if self.size > 1:
                report, *_ = self.call_all("check_rows", variant.name, *_leaves(variant, example), seconds=seconds)
                self.reports_of[variant.name] = report
                self.whole[variant.name] = report.reason
                self.loss[variant.name] = report.loss

    # --- commands ---

    def train_step(self, inputs: Any, targets: Any = None, **keywords: Any) -> float:
        return self.over_shards("train_step", self.shards(inputs, targets), **keywords)[0].loss

    def forward_backward(self, inputs: Any, targets: Any = None) -> float:
        return self.over_shards("forward_backward", self.shards(inputs, targets))[0].loss

    def optimizer_step(self, gradients: dict[str, Tensor] | None = None, lr: float | None = None) -> Any:
        return self.call_all("optimizer_step", gradients, lr=lr)[0]

    def zero_grad(self) -> None:
        self.call_all("zero_grad")

    def compute_gradients(
        self, inputs: Any, targets: Any = None, *, vectors: Any = None, **query: Any
    ) -> tuple[Any, Any, Any]:
        """(rank 0's report, input gradients, outputs), both of the whole batch and nested."""
        asked = GradientQuery(**query)
        shards = self.shards(inputs, targets, training=asked.training)
        reports = self.over_shards("compute_gradients", shards, asked, vectors=vectors)
        variant = self.variant_of(shards)
        return (
            reports[0],
            self._combine(shards, [r.input_gradients for r in reports], variant.input_leaves, variant.input_structure),
            self._combine(shards, [r.outputs for r in reports], None, variant.output_structure),
        )

    def forward(self, inputs: Any, *, training: bool = False, seed: int | None = None) -> Any:
        shards = self.shards(inputs, None, training=training, with_targets=False)
        reports = self.over_shards("forward", shards, training=training, seed=seed)
        return self._combine(shards, [r.outputs for r in reports], None, self.variant_of(shards).output_structure)

    def state_dict(self) -> dict[str, Tensor]:
        """Rank 0's, after a check that all ranks have the same bits."""
        states = self.call_all("state_dict")
        for state in states[1:]:
            for name, tensor in state.items():
                assert torch.equal(tensor, states[0][name]), f"replicas differ in {name}"
        return states[0]

    # --- parts ---

    def shards(self, inputs: Any, targets: Any, *, training: bool = True, with_targets: bool = True) -> list[Shard]:
        batch = Batch(from_nested(inputs), None if targets is None else from_nested(targets))
        wants_targets = with_targets and targets is not None
        variant, rows = select_variant(self.variants, batch, training=training, targets=wants_targets)
        whole = self.whole[variant.name] is not None
        return [_as_tensors(each) for each in split(variant, rows, batch, ranks=self.size, whole=whole)]

    def variant_of(self, shards: list[Shard]) -> Any:
        return next(variant for variant in self.variants if variant.name == shards[0].variant)

    def over_shards(self, name: str, shards: list[Shard], *arguments: Any, **keywords: Any) -> list[Any]:
        self.command += 1
        each = [((shard, *arguments), {"command": self.command, **keywords}) for shard in shards]
        self.reports = self.call(name, each)
        return self.reports

    def call_all(self, name: str, *arguments: Any, **keywords: Any) -> list[Any]:
        return self.call(name, [(arguments, keywords)] * self.size)

    def call(self, name: str, each: list[tuple[tuple, dict]]) -> list[Any]:
        """All answers, or the root cause, after the ranks have rejoined."""
        answers = self.processes.call(name, each)
        errors = [answer for kind, answer in answers if kind == "error"]
        if not errors:
            return [answer for _, answer in answers]
        self.errors = errors
        if name != "start" and any(self.call_all("needs_rejoin")):
            self.call_all("rejoin", self.processes.new_generation())
        raise next((error for error in errors if getattr(error, "reason", "") != "PEER_FAILED"), errors[0])

    def rank_rows(self) -> list[int]:
        return [report.rows for report in self.reports]

    def _combine(self, shards: list[Shard], parts: list[Any], specs: Any, structure: Any) -> Any:
        if parts[0] is None:
            return None
        encoded = [None if part is None else [_data(leaf) for leaf in part] for part in parts]
        leaves = combine_leaves(shards, encoded, specs)
        return unflatten(
            structure, [to_torch(leaf, writable=True) if isinstance(leaf, TensorData) else leaf for leaf in leaves]
        )


def _data(leaf: Any) -> Any:
    return from_any(leaf) if isinstance(leaf, Tensor) else leaf


def _sent(option: Any) -> Any:
    """An option as it can be pickled: codec and channel would have made bytes of its tensors too."""
    if not isinstance(option, (Tensor, TensorData)):
        return option
    data = from_any(option)
    return TensorData(data.dtype, data.shape, bytes(data.data))


def _leaves(variant: Any, example: Batch) -> list[list[Any]]:
    """Those of the example's inputs, and of its targets."""
    flat = [flatten(variant.input_structure, from_nested(example.inputs), "example.inputs"), []]
    if variant.target_structure is not None:
        flat[1] = flatten(variant.target_structure, from_nested(example.targets), "example.targets")
    return [[to_torch(leaf) if isinstance(leaf, TensorData) else leaf for leaf in leaves] for leaves in flat]


def _as_tensors(shard: Shard) -> Shard:
    def torch_leaves(leaves: tuple) -> tuple:
        return tuple(to_torch(leaf) if isinstance(leaf, TensorData) else leaf for leaf in leaves)

    return replace(shard, inputs=torch_leaves(shard.inputs), targets=torch_leaves(shard.targets))


@pytest.fixture(scope="session")
def rank_processes(tmp_path_factory: pytest.TempPathFactory, torch_forks: TorchForks) -> Iterator[RankProcesses]:
    processes = RankProcesses(tmp_path_factory.mktemp("r"), torch_forks)
    yield processes
    processes.close()


MakeGroup = Callable[..., Group]


@pytest.fixture
def make_group(rank_processes: RankProcesses) -> MakeGroup:
    """make_group(module, loss, example, ranks=..., sgd={...}, **spec) -> Group."""

    def make(
        module: nn.Module,
        loss: Any,
        example: tuple[Any, Any],
        *,
        ranks: int = 2,
        sgd: dict | None = None,
        optimizer: OptimizerSpec | None = None,
        loss_spec: LossSpec | None = None,
        processes: RankProcesses = rank_processes,
        seconds: float = float("inf"),
        **spec: Any,
    ) -> Group:
        exported = ModuleExporter(module, loss, spec.get("precision", "fp32")).export_model(*example)
        chosen = loss_spec or exported.loss
        if isinstance(chosen, TorchLossSpec):
            chosen = TorchLossSpec(chosen.name, {name: _sent(value) for name, value in chosen.options.items()})
        model = ModelSpec(
            program=exported.program,
            loss=chosen,
            optimizer=optimizer or OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9} if sgd is None else sgd),
            workers=ranks,
            **spec,
        )
        return Group(processes, model, dict(exported.tensors), exported.example, seconds)

    return make


@pytest.fixture
def assert_close() -> Callable[..., None]:
    """Per tensor: |a - b| <= tol * max(|b|, 1e-3 * |all b|), Euclidean; tol 1e-5, or 1e-12 in float64."""

    def check(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float | None = None) -> None:
        assert found.keys() == expected.keys()
        floats = [each.double() for each in expected.values() if each.is_floating_point()]
        everything = sum(float(each.norm()) ** 2 for each in floats) ** 0.5
        for name, reference in expected.items():
            if not reference.is_floating_point():
                assert torch.equal(found[name], reference), name
                continue
            allowed = tolerance or (1e-12 if reference.dtype is torch.float64 else 1e-5)
            distance = float((found[name].double() - reference.double()).norm())
            bound = allowed * max(float(reference.double().norm()), 1e-3 * everything)
            assert distance <= bound, f"{name}: {distance:.2e} > {bound:.2e}"

    return check


@pytest.fixture
def fails_as() -> Callable[..., Any]:
    """`with fails_as(kind, reason, field):`"""

    @contextmanager
    def check(kind: type[GradwireError], reason: str, field: str | None = None) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        assert caught.value.reason == reason, caught.value
        if field is not None:
            assert caught.value.field == field

    return check
