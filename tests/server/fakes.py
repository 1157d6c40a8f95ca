"""Ranks that compute nothing and write down what they are asked for, and the cluster that starts them."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from server.small_models import WEIGHT, read, two_floats, whole

from gradwire_proto.errors import InvalidArgument, RankLost
from gradwire_proto.token_file import DEFAULT_OWNER
from gradwire_proto.values import (
    ArchitectureSpec,
    BackwardResult,
    Batch,
    BatchLosses,
    BatchShapes,
    CompiledKernels,
    DerivativeResult,
    ForwardResult,
    GradientResult,
    ModelState,
    ModelUpdate,
    Sharding,
    SplitDecision,
    StateTensor,
    StepResult,
    StepsResult,
    TensorData,
    Timing,
    Variant,
)
from gradwire_workers.pool.capacity_queue import CapacityQueue, Waiting


class FakeRetained:
    """The same ranks, asked for forwards that they retain: `kept`, by name."""

    def __init__(self, workers: FakeWorkers) -> None:
        self._workers = workers
        self.kept: list[str] = []

    async def forward(
        self, inputs: Any, retention: Any, name: str, *, training: bool, seed: int | None, command: int
    ) -> ForwardResult:
        await self._workers._call("retained_forward", retention, training, seed, command)
        self.kept.append(name)
        return ForwardResult(outputs=inputs, step=self._workers.step, retained=name, differentiable_outputs=(0,))

    async def backward(self, query: Any, cotangents: Any) -> BackwardResult:
        await self._workers._call("backward", query, [each and read(each) for each in cotangents])
        return BackwardResult(
            input_gradients=[two_floats(), None] if query.input_gradients else None, step=self._workers.step
        )

    async def release(self, names: Any) -> None:
        await self._workers._call("release", names)
        self.kept = [name for name in self.kept if name not in names]

    async def held_gradients(self, wrt: Any) -> tuple[dict[str, TensorData], int]:
        await self._workers._call("held_gradients", wrt)
        return {"w": two_floats()}, self._workers.step

    async def set_gradients(self, gradients: Any, dropped: Any) -> int:
        given = {name: read(value) for name, value in gradients.items()}
        await self._workers._call("set_gradients", given, dropped)
        return self._workers.step


class FakeFitting:
    """The same ranks, asked for fits: each step takes 20 ms by their clock, and its loss is its number in the fit.

    applied: (number, step of the fit, rows) of each step. refused_at: the step that is refused.
    """

    def __init__(self, workers: FakeWorkers) -> None:
        self._workers = workers
        self.applied: list[tuple[int, int, tuple[int, ...]]] = []
        self.examples: list[bytes] = []
        self.refused_at: int | None = None

    async def run(self, dataset: Batch, steps: Any, *, most: int | None = None, command: int) -> StepsResult:
        count = steps.steps if most is None else min(most, steps.steps)
        examples = dataset.inputs.shape[0]
        per_epoch = -(-examples // steps.batch_size)
        self.examples.append(read(dataset.inputs))
        await self._workers._call("fit", steps.first_step, count)
        recorded = struct.unpack(f"<{len(steps.rows) // 4}I", steps.rows)
        error, losses = None, []
        for index in range(count):
            step = steps.first_step + index
            if step == self.refused_at:
                error = InvalidArgument("the loss is nan", field="batch", reason="LOSS_NOT_FINITE")
                break
            epoch, row = step // per_epoch, step % per_epoch * steps.batch_size
            size = min(steps.batch_size, examples - row)
            taken, recorded = recorded[:size], recorded[size:]
            if steps.seed is not None:
                taken = tuple((each + steps.seed + epoch) % examples for each in range(row, row + size))
            self.applied.append((command + index, step, taken))
            losses.append(float(step))
        if error is not None and not losses:
            raise error
        self._workers.step += len(losses)
        self._workers.applied += 1
        timing = Timing(compute=0.02 * len(losses))
        return StepsResult(losses=tuple(losses), step=self._workers.step, timing=timing, error=error)

    async def forget(self) -> None:
        await self._workers._call("forget")

    async def evaluate(self, dataset: Batch, batch_size: int, *, first: int, most: int) -> BatchLosses:
        await self._workers._call("evaluate", first, most)
        count = min(most, -(-dataset.inputs.shape[0] // batch_size) - first)
        return BatchLosses(losses=(100.0 + self._workers.step,) * count, seconds=0.02 * count)


class FakeFlow:
    """Steps that are handed to FakeWorkers, which are at one message at a time, or at `most_ahead` more steps."""

    def __init__(self, workers: FakeWorkers, took: Any) -> None:
        self.workers = workers
        self.took = took
        self.sent: deque[tuple[int, Any]] = deque()

    @property
    def has_room(self) -> bool:
        return len(self.sent) <= self.workers.most_ahead

    def send(self, steps: Any, *, command: int) -> None:
        self.workers.dispatches.append(len(steps))
        self.sent.extend(enumerate(steps, start=command))

    async def ended(self) -> None:
        while self.sent:
            number, step = self.sent[0]
            result = await self.workers.train_step(step.form.batch(step.data), command=number, lr=step.lr)
            self.sent.popleft()
            self.took([result])


class FakeKernels:
    """The same ranks, asked for compiled kernels. `ready`: shapes that are found ready; `error`: what `use` raises."""

    def __init__(self, workers: FakeWorkers, in_use: tuple[BatchShapes, ...] = ()) -> None:
        self._workers = workers
        self.in_use = list(in_use)
        self.ready: list[BatchShapes] = []
        self.refused: dict[BatchShapes, str] = {}
        self.error: Exception | None = None

    @property
    def told(self) -> tuple[CompiledKernels, ...]:
        waiting = [each for each in self.ready if each not in self.in_use]
        return tuple(
            [CompiledKernels(each, "in_use") for each in self.in_use]
            + [CompiledKernels(each, "refused", reason) for each, reason in self.refused.items()]
            + [CompiledKernels(each, "compiling") for each in waiting if each not in self.refused]
        )

    async def advance(self, refused: Mapping[BatchShapes, str]) -> BatchShapes | None:
        self.refused = dict(refused)
        await asyncio.sleep(0)
        return next((each.batches for each in self.told if each.state == "compiling"), None)

    async def use(self, shapes: BatchShapes, *, again: bool) -> None:
        await self._workers._call("use_kernels", shapes, again)
        if self.error is not None:
            raise self.error
        self._workers.applied += 1
        self.in_use.append(shapes)


class FakeWorkers:
    """Ranks that remember what they were asked. `gate` cleared holds them in the middle of a call.

    `kept` is what `salvage` gives. Batches that begin with `refused` are refused.
    """

    def __init__(self, state: ModelState | None = None, cluster: FakeCluster | None = None) -> None:
        self.cluster = cluster
        self.applied = 0
        self.kept: ModelState | None = None
        self.salvaged: list[int] = []
        self.sharding = Sharding("rows", "fake")
        self.device = "cpu"
        self.on_lost = None
        self.tensors: tuple[StateTensor, ...] = ()
        self.variants: tuple[Variant, ...] = ()
        self.splits: dict[str, SplitDecision] = dict(state.splits) if state is not None else {"train": whole(None)}
        self.expected: Mapping[str, SplitDecision] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls: list[tuple[Any, ...]] = []
        self.most_together = 1000
        self.most_ahead = 0
        self.dispatches: list[int] = []
        self.refused: bytes | None = None
        self.weights = two_floats()
        self.error: Exception | None = None
        self.result: Any = None
        self.step = 0
        self.busy = False
        self.closed: list[bool] = []
        self.vacated = False
        self.on_close: Callable[[], None] = lambda: None
        self.limited = True
        self.retained = FakeRetained(self)
        self.fitting = FakeFitting(self)
        self.kernels = FakeKernels(self, () if state is None else state.kernels)
        if state is not None:
            self.weights, self.step = next(iter(state.tensors.values())), state.step
            self.weights = TensorData("float32", (1, 2), read(self.weights))

    @property
    def retains(self) -> bool:
        return bool(self.retained.kept)

    def expect(self, splits: Mapping[str, SplitDecision]) -> None:
        self.expected = splits

    @contextmanager
    def without_limits(self) -> Iterator[None]:
        self.limited = False
        yield
        self.limited = True

    async def state(self) -> ModelState:
        assert not self.busy, "calls overlap"
        await self.gate.wait()
        return self.now()

    def now(self) -> ModelState:
        """The state after what was called so far."""
        return ModelState(
            tensors={each.name: self.weights for each in self.tensors or (WEIGHT,)},
            optimizer=None,
            step=self.step,
            command=0,
            trained=("w",),
            held=(None,),
            splits=self.splits,
            opened=(),
            threads=1,
            kernels=tuple(self.kernels.in_use),
        )

    async def salvage(self, applied: int) -> ModelState | None:
        self.salvaged.append(applied)
        return self.kept

    async def _call(self, *what: Any) -> None:
        assert not self.busy, "calls overlap"
        self.busy = True
        try:
            self.calls.append(what)
            await asyncio.sleep(0)
            await self.gate.wait()
            if self.error is not None:
                raise self.error
        finally:
            self.busy = False

    async def train_step(self, batch: Batch, *, command: int, lr: float | None = None) -> StepResult:
        value = read(batch.inputs)
        if self.cluster is not None and self.cluster.deadly and value.startswith(self.cluster.deadly):
            raise RankLost("rank 0 died", outcome="unknown")
        if self.refused is not None and value.startswith(self.refused):
            raise InvalidArgument("too large", field="batch.inputs", reason="SHAPE_MISMATCH")
        await self._call("train_step", value, command, lr)
        self.step += 1
        self.applied += 1
        return StepResult(loss=0.5, step=self.step, num_examples=1, lr=lr, rank_rows=(1,))

    def together(self, steps: Any) -> int:
        return min(len(steps), self.most_together)

    def step_flow(self, took: Any) -> FakeFlow:
        return FakeFlow(self, took)

    async def forward_backward(self, batch: Batch, *, command: int) -> StepResult:
        await self._call("forward_backward", command)
        return StepResult(loss=0.5, step=self.step)

    async def optimizer_step(self, gradients: Any, *, lr: float | None = None, groups: Any = ()) -> StepResult:
        given = gradients and {name: read(value) for name, value in gradients.items()}
        await self._call("optimizer_step", given, *([groups] if groups else []))
        self.step += 1
        return StepResult(loss=None, step=self.step)

    async def zero_grad(self) -> None:
        await self._call("zero_grad")

    async def compute_gradients(self, batch: Batch, query: Any, vectors: Any = None) -> GradientResult:
        await self._call("compute_gradients", query, vectors and {name: read(each) for name, each in vectors.items()})
        return self.result or GradientResult(
            loss=0.5, step=self.step, num_examples=1, gradients={"w": two_floats()}, outputs=(two_floats(), 3)
        )

    async def forward(self, inputs: Any, *, training: bool, seed: int | None, command: int) -> ForwardResult:
        await self._call("forward", training, seed, command)
        return self.result or ForwardResult(outputs=inputs, step=self.step)

    async def state_dict(self, names: Any) -> tuple[dict[str, TensorData], int]:
        await self._call("state_dict", names)
        return self.result or {"w": self.weights}, self.step

    async def load_state_dict(self, tensors: Any, *, partial: bool) -> int:
        await self._call("load_state_dict", partial)
        self.weights = TensorData("float32", (1, 2), read(tensors["w"]))
        return self.step

    async def optimizer_state(self) -> tuple[Any, int]:
        await self._call("optimizer_state")
        return {"optimizer": "SGD", "state": {"w": {"momentum_buffer": self.weights}}, "schedule": None}, self.step

    async def load_optimizer_state(self, state: Any) -> int:
        await self._call("load_optimizer_state", read(state["state"]["w"]["momentum_buffer"]))
        return self.step

    async def update(self, update: ModelUpdate) -> tuple[str, ...]:
        await self._call("update", update)
        return tuple(pattern for pattern, trainable in update.trainable if trainable)

    async def add_variant(self, variant: Variant, **parts: Any) -> None:
        await self._call("add_variant", variant.name)
        found = whole(None if self.cluster is None else self.cluster.tried)
        self.splits = {**self.splits, variant.name: self.expected.get(variant.name, found)}

    async def vacate(self) -> None:
        self.vacated = True

    async def close(self, *, reuse: bool = True) -> None:
        self.closed.append(reuse)
        self.on_close()


@dataclass
class FakeCluster:
    """Starts FakeWorkers. `gate` cleared holds it in the middle of a start. `deadly` batches kill ranks.

    queue: where new models wait for capacity, which they hold until their ranks are closed; None: there is always some.
    tried: why batches of a variant that is added are not split, as trying tells.
    """

    capacity: Any = field(default_factory=lambda: SimpleNamespace(workers=2, free_workers=1, gpus=0.0))
    groups: dict[str, FakeWorkers] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    error: Exception | None = None
    deadly: bytes = b""
    tried: str | None = None
    built: tuple[tuple[StateTensor, ...], tuple[Variant, ...]] = ((WEIGHT,), ())
    starting: int = 0
    tries: int = 0
    started: list[tuple[str, ModelState | None]] = field(default_factory=list)
    places: list[FakeWorkers | None] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    queue: CapacityQueue | None = None
    others: dict[str, FakeCluster] = field(default_factory=dict)
    """Those of owners that have a name."""

    def __post_init__(self) -> None:
        self.gate.set()

    def of(self, owner: str) -> FakeCluster:
        return self if owner == DEFAULT_OWNER else self.others.setdefault(owner, FakeCluster())

    async def start_group(
        self,
        spec: Any,
        tensors: Any,
        example: Any,
        *,
        model_id: str,
        state: ModelState | None = None,
        place: FakeWorkers | None = None,
        again: bool = False,
        wait_until: float | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> FakeWorkers:
        demand = None if self.queue is None else self.capacity.demand(spec)
        if self.queue is not None and demand is not None:
            await self.queue.claim(demand, Waiting(until=wait_until, tell=tell))
        self.places.append(place)
        self.starting += 1
        self.tries += 1
        try:
            self.values = {name: read(value) for name, value in tensors.items()}
            await self.gate.wait()
            if self.error is not None:
                raise self.error
            self.started.append((model_id, state))
            group = self.groups[model_id] = FakeWorkers(state, self)
            if demand is not None:
                group.on_close = lambda: self.capacity.free(demand)
            if isinstance(spec.program, ArchitectureSpec):
                group.tensors, group.variants = self.built
            return group
        finally:
            self.starting -= 1

    async def compute_function_gradients(self, function: Any, batch: Batch, query: Any) -> GradientResult:
        self.functions.append(function)
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return GradientResult(loss=2.0, step=0, num_examples=1, gradients={}, input_gradients=batch.inputs)

    async def differentiate_function(self, function: Any, batch: Batch, query: Any, vectors: Any) -> DerivativeResult:
        self.functions.append((function, query, [read(each) for each in vectors]))
        await self.gate.wait()
        return DerivativeResult(outputs=(batch.inputs,), derivatives=(two_floats(), two_floats(b"y" * 8)))
