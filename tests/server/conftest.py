"""A frontend in this process over fake ranks: milliseconds a test, and a real gRPC server on a free port."""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from gradwire_proto import codec
from gradwire_proto.errors import GradwireError, InvalidArgument, RankLost
from gradwire_proto.status import from_rpc_error
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import (
    ArchitectureSpec,
    BackwardResult,
    Batch,
    BatchShapes,
    CompiledKernels,
    DerivativeResult,
    ForwardResult,
    GradientResult,
    Graph,
    GraphInput,
    LeafRef,
    ModelSpec,
    ModelState,
    ModelUpdate,
    Node,
    NodeRef,
    OptimizerSpec,
    Program,
    Segment,
    Sharding,
    SplitDecision,
    StateTensor,
    StepResult,
    StepsResult,
    Symbol,
    TensorData,
    TensorSpec,
    Timing,
    Variant,
)
from gradwire_server.config import ServerConfig, load_config
from gradwire_server.model_storage import ModelStorage
from gradwire_server.service import Service
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.storage_lock import StorageLock

MUL = "aten::mul.Tensor(Tensor self, Tensor other) -> Tensor"


def two_floats(value: bytes = b"\0\0\x80\x3f\0\0\0\x40") -> TensorData:
    """A row of two floats."""
    return TensorData("float32", (1, 2), value)


def read(tensor: TensorData) -> bytes:
    """A tensor's bytes, wherever they are."""
    if isinstance(tensor.data, Segment):
        content = Path(tensor.data.path).read_bytes()
        return content[tensor.data.offset : tensor.data.offset + tensor.data.nbytes]
    return bytes(tensor.data)


def variant(name: str = "train") -> Variant:
    """x * w."""
    graph = Graph(
        inputs=("w", "x"),
        nodes=(Node("y", "aten.mul.Tensor", (NodeRef("x"), NodeRef("w"))),),
        outputs=(NodeRef("y"),),
    )
    return Variant(
        name=name,
        training=True,
        graph=graph,
        graph_inputs=(GraphInput("tensor", "w"), GraphInput("input", 0)),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec("float32", ("rows", 2)),),
        output_structure=LeafRef(0),
        symbols=(Symbol("rows"),),
    )


WEIGHT = StateTensor(name="w", role="parameter", dtype="float32", shape=(1, 2), requires_grad=True)


def model_spec(**changes: Any) -> ModelSpec:
    """A model of one parameter."""
    program = Program(
        torch_version="2.13.0",
        tensors=(WEIGHT,),
        variants=(variant(),),
        operators={"aten.mul.Tensor": MUL},
    )
    return ModelSpec(**{"program": program, "optimizer": OptimizerSpec("SGD", {"lr": 0.1})} | changes)


def whole(reason: str | None) -> SplitDecision:
    """Why batches are not split; None: they are."""
    return SplitDecision(whole=reason, inputs_whole=False, returns_loss=False, loss=None, weight=None)


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
        rows = struct.unpack(f"<{len(steps.rows) // 4}I", steps.rows)
        error, losses = None, []
        for index in range(count):
            step = steps.first_step + index
            if step == self.refused_at:
                error = InvalidArgument("the loss is nan", field="batch", reason="LOSS_NOT_FINITE")
                break
            size = min(steps.batch_size, examples - step % per_epoch * steps.batch_size)
            taken, rows = rows[:size], rows[size:]
            self.applied.append((command + index, step, taken))
            losses.append(float(step))
        if error is not None and not losses:
            raise error
        self._workers.step += len(losses)
        self._workers.applied += 1
        timing = Timing(compute=0.02 * len(losses))
        return StepsResult(losses=tuple(losses), step=self._workers.step, timing=timing, error=error)

    async def orders(self, rows: int, seeds: Any) -> list[bytes]:
        await self._workers._call("orders", tuple(seeds))
        return [struct.pack(f"<{rows}I", *[(row + seed) % rows for row in range(rows)]) for seed in seeds]

    async def forget(self) -> None:
        await self._workers._call("forget")

    async def evaluate(self, dataset: Batch, batch_size: int) -> float:
        await self._workers._call("evaluate", batch_size)
        return 100.0 + self._workers.step


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
        self.dispatches: list[int] = []
        self.refused: bytes | None = None
        self.weights = two_floats()
        self.error: Exception | None = None
        self.result: Any = None
        self.step = 0
        self.busy = False
        self.closed: list[bool] = []
        self.vacated = False
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

    async def train_steps(self, steps: Any, *, command: int, took: Any) -> None:
        self.dispatches.append(len(steps))
        for number, step in enumerate(steps, start=command):
            took([await self.train_step(step.form.batch(step.data), command=number, lr=step.lr)])

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


@dataclass
class FakeCluster:
    """Starts FakeWorkers. `gate` cleared holds it in the middle of a start. `deadly` batches kill ranks.

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

    def __post_init__(self) -> None:
        self.gate.set()

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
    ) -> FakeWorkers:
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


class Frontend:
    """A running frontend, and requests to it as any client would send them."""

    def __init__(self, service: Service, cluster: FakeCluster, channel: grpc.aio.Channel, target: str, folder: Path):
        self.service = service
        self.cluster = cluster
        self.channel = channel
        self.target = target
        self.folder = folder
        self.stub: Any = pb_grpc.GradientServiceStub(channel)

    @property
    def files(self) -> list[str]:
        """What lies in shared memory."""
        return sorted(path.name for path in self.folder.iterdir())

    async def create(self, model_id: str = "m", **changes: Any) -> FakeWorkers:
        """Make a model; its ranks."""
        await self.stub.CreateModel(self.creation(model_id, **changes))
        return self.cluster.groups[model_id]

    def creation(self, model_id: str = "m", request_id: str = "", value: Any = None, **changes: Any) -> Any:
        """A request for a model."""
        request = pb.CreateModelRequest(model_id=model_id, request_id=request_id)
        codec.encode_model_spec(model_spec(**changes), request.model)
        codec.encode_named_tensors({"w": value or two_floats()}, request.tensors)
        return request

    def train(self, value: bytes | None = None, *, model_id: str = "m", request_id: str = "", lr: float = 0.1) -> Any:
        """A request for a training step; `value` tells steps apart."""
        request = pb.TrainStepRequest(name=f"models/{model_id}", request_id=request_id, learning_rate=lr)
        inputs = two_floats() if value is None else two_floats(value.ljust(8, b"\0"))
        codec.encode_batch(Batch(inputs), request.batch)
        return request

    async def upload(
        self, *tensors: TensorData, chunks: list[bytes] | None = None, pause: float = 0, upload_id: str = ""
    ) -> str:
        """Upload tensors, or other bytes under their headers."""

        async def messages() -> AsyncIterator[pb.UploadTensorsRequest]:
            manifest = pb.UploadManifest(upload_id=upload_id)
            for tensor in tensors:
                message = codec.encode_tensor(tensor)
                manifest.tensors.add(dtype=message.dtype, shape=message.shape)
            yield pb.UploadTensorsRequest(manifest=manifest)
            for chunk in [bytes(tensor.data) for tensor in tensors] if chunks is None else chunks:
                yield pb.UploadTensorsRequest(chunk=chunk)
                await asyncio.sleep(pause)

        return (await self.stub.UploadTensors(messages())).name

    async def download(self, name: str) -> bytes:
        """The bytes of a download."""
        return b"".join([r.chunk async for r in self.stub.DownloadTensors(pb.DownloadTensorsRequest(name=name))])

    async def error(self, call: Awaitable[Any]) -> GradwireError:
        """The error that a call ends with, as the SDK would raise it."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value, command=True)

    async def until(self, condition: Callable[[], Any], seconds: float = 5.0) -> None:
        """Wait until `condition()` holds."""
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.002)

    async def model(self, model_id: str = "m") -> model_pb2.Model:
        """The model's description."""
        return await self.stub.GetModel(pb.GetModelRequest(name=f"models/{model_id}"))


@asynccontextmanager
async def _running(
    folder: Path, storage: Path, settings: dict[str, Any], held: bool = False, sockets: Path | None = None
) -> AsyncIterator[Frontend]:
    config: ServerConfig = load_config(None, {"listen": "127.0.0.1:0"} | settings)
    folder.mkdir(exist_ok=True)
    cluster = FakeCluster()
    if held:
        cluster.gate.clear()
    lock = StorageLock.take(storage, 1.0)
    checkpoints = CheckpointStore(
        str(storage / "checkpoints"), storage / "fetched", owner=lock.storage_id, fence=lock.check
    )
    service = Service(cluster, folder, config, ModelStorage(lock, checkpoints), sockets)
    target = f"127.0.0.1:{await service.start()}"
    try:
        async with grpc.aio.insecure_channel(target) as channel:
            yield Frontend(service, cluster, channel, target, folder)
    finally:
        for group in cluster.groups.values():
            group.gate.set()
        async with asyncio.timeout(10):
            await service.close()
        lock.release()


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Any]:
    """`async with start(models=1) as frontend`: a frontend with these settings.

    held: no ranks start until told so. place: the name of the folder that keeps its models. sockets: where clients
    find the socket over which memory is shared.
    """

    def running(held: bool = False, place: str = "storage", sockets: Path | None = None, **settings: Any) -> Any:
        return _running(tmp_path / "held", tmp_path / place, settings, held, sockets)

    return running


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Where frontends that `start` starts keep models."""
    return tmp_path / "storage"


@pytest.fixture
async def frontend(start: Callable[..., Any]) -> AsyncIterator[Frontend]:
    """A frontend with the default settings."""
    async with start() as running:
        yield running


@pytest.fixture
def fakes() -> Any:
    """What tests build requests and ranks from."""
    return SimpleNamespace(
        FakeWorkers=FakeWorkers,
        two_floats=two_floats,
        model_spec=model_spec,
        variant=variant,
        read=read,
        request_id=lambda: str(uuid.uuid4()),
    )
