"""The client of one service: makes and finds models, and differentiates plain functions."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

from gradwire.architecture import Architecture
from gradwire.arguments import as_bool, as_function
from gradwire.checkpoints import delete_checkpoint, get_checkpoint, list_checkpoints, restore_model
from gradwire.connection_settings import as_tls, check_target, check_timeout, check_token
from gradwire.creation import create_model
from gradwire.datasets import Dataset, get_dataset, list_datasets, upload_dataset
from gradwire.deadline import Deadline
from gradwire.function_transforms import FunctionTransforms
from gradwire.model import Model
from gradwire.optim import Optimizer
from gradwire.rpc import Rpc
from gradwire.tls import TLS
from gradwire_proto import codec
from gradwire_proto.names import check_model_id, model_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Checkpoint, ModelInfo, ServerInfo

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_TARGET = "localhost:50051"


def connect(
    target: str | None = None,
    *,
    token: str | None = None,
    tls: TLS | bool | None = None,
    timeout: float = 60.0,
    shared_memory: bool = True,
) -> Client:
    """A client of a service that runs already.

    target: "host:port"; $GRADWIRE_TARGET where left out, then localhost:50051. token: proves who calls. tls: None is
    plain text, True trusts the system's certificates, TLS(...) says whom to trust. timeout: seconds that each call
    takes at most, in however many requests; one that is not answered in time raises DeadlineExceeded. Until then, a
    call whose answer is lost, or that meets a service that is away, starts, recovers or is full, is sent again, and the
    service runs it once. What is exported here, or waits behind futures of the model, does not count yet. Tensors above
    4 MiB together travel in a stream of their own, before the request or after the reply: that may take longer, as long
    as it moves. Before, it may stand still while the call has time; after, for `timeout` seconds. shared_memory:
    whether tensors may travel through memory that a service on this machine shares with this process, and small steps
    over its socket, where it offers that; nothing else changes by it.

    Raises Unavailable where no service answers: this does not wait for one; Unauthenticated where it asks for another
    token; InvalidArgument where an argument cannot be one: its `field` names it, and no text shows the token.
    """
    given = target if target not in (None, "") else os.environ.get("GRADWIRE_TARGET")
    rpc = Rpc(
        check_target(given or DEFAULT_TARGET),
        token=check_token(token),
        tls=as_tls(tls),
        timeout=check_timeout(timeout),
        shared_memory=as_bool(shared_memory, "shared_memory"),
    )
    client = Client(rpc)
    try:
        # Once: whoever connects to what is not there learns of it at once.
        rpc.local.offer(rpc.call("GetServerInfo", pb.GetServerInfoRequest(), repeat=False).local_socket)
    except BaseException:
        client.close()
        raise
    return client


class Client(FunctionTransforms):
    """A client of one service. Made by `connect` and `launch`; close it, or use it in a `with`.

    Threads may share it; a process that was forked must make its own (DataLoader workers that do not use it are fine).
    """

    def __init__(self, rpc: Rpc) -> None:
        super().__init__(rpc)
        self._rpc = rpc
        self._models: WeakSet[Model] = WeakSet()
        self._closing = threading.Lock()
        self._on_close: list[Callable[[], None]] = []

    @property
    def target(self) -> str:
        """Where the service listens, "host:port"."""
        return self._rpc.target

    def create_model(
        self,
        module: nn.Module | Architecture,
        *,
        example: Any,
        loss: LossFunction | str | None = None,
        optimizer: Optimizer | None = None,
        workers: int = 1,
        model_id: str | None = None,
        seed: int = 0,
        device: str = "auto",
        gpus_per_worker: float = 0.0,
        require_sharding: bool = False,
        on_nan: str = "report",
        labels: Mapping[str, str] | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        precision: str = "fp32",
        loss_reduction: str | None = None,
        loss_weight: Callable[..., Tensor] | None = None,
        durability: str | None = None,
        checkpoint_every: int | None = None,
        keep_checkpoints: int | None = None,
        deterministic: bool = False,
        sync_batch_norm: bool = True,
        compile: bool = False,
        wait_for_capacity: float = 0.0,
    ) -> Model:
        """Bring `module`, with its weights as they are, to the service. Returns when the model is ready.

        The module itself is never changed, and does not follow the model: pull weights with `state_dict`.
        Or have the service build a `gradwire.Architecture`, which needs no module and sends no weights: its `loss` is
        one that the service knows by name, or None; its outputs come as tuples, lists and dicts; the example's inputs,
        as all its batches later, may be of any shape that it takes.

        example: (inputs, targets) used to export the module and its loss, not trained on; (inputs,) or (inputs, None)
            where there are no targets. A list is taken as a tuple is, so that a batch of a DataLoader will do. Two rows
            or more tell best which dimension is the batch.
        loss: a torch.nn loss, its name ("cross_entropy"), any callable(outputs, targets) -> scalar, or None where the
            module returns the loss itself, as a scalar or under `.loss` or ["loss"].
        optimizer: a spec of `gradwire.optim`; None where the service never updates.
        workers: how many ranks share each batch. model_id: 1 to 63 of [a-z0-9-], first a letter; chosen where left out.
        seed: of dropout and other random operators in the model's commands, each of which draws anew.
        device: "auto", "cpu" or "cuda". gpus_per_worker: GPUs of each rank; fractions share one.
        require_sharding: refuse a model whose batches cannot be split over the ranks, instead of running it on one.
        on_nan: "report" or "refuse" a loss that is not finite; a refused step changes nothing.
        labels: free-form, at most 64, keys and values of at most 63 characters.
        clip_grad_norm, clip_grad_value: before each update, scale the whole batch's gradients so that the norm of all
            together is this at most, then cut each element to this size, as torch.nn.utils.clip_grad_norm_ and
            clip_grad_value_ do; also gradients of the client's own. StepResult.grad_norm is the norm before.
        precision: "fp32", "bf16" or "fp16": forward and loss run under torch.autocast of that type, on the service as
            they would here; parameters, gradients and optimizer state keep their types, and float64 stays float64.
            With "fp16" the loss is scaled by the rule of torch.amp.GradScaler: a step whose gradients overflowed is
            skipped (StepResult.skipped, with step counter and schedule where they were) and the scale halved, whatever
            on_nan says. Gradients come back unscaled, and are clipped unscaled; the client's own are taken as they are.
        loss_reduction: "mean" or "sum", where a batch's loss is the mean or the sum of its rows' losses. Each rank then
            computes the loss of its own rows, where otherwise it gathers all outputs for a loss that is a callable.
        loss_weight: a callable(inputs), or callable(inputs, targets) where there are targets, that gives what rows
            weigh in the loss as a scalar tensor, such as how many targets count, for a loss that is a mean over that.
            This and loss_reduction are tried on batches like the example; where they do not hold, InvalidArgument. One
            worker tries them too, but for modules whose batch norm trains or that have functions of their own. The
            loss that a module returns is tried anyway for sums, and for means over rows and over targets that count.
        durability: what an answered command outlives: "process" is every process of the service, "disk" the machine,
            "none" nothing; None is the server's setting of that name, as for the next two.
        checkpoint_every: commands from one automatic checkpoint to the next: fewer make for a quicker recovery.
        keep_checkpoints: how many automatic checkpoints stay, the newest ones. Neither goes with durability "none".
        deterministic: the same state and command give the same bits on CUDA too, by slower kernels; an operator that
            has none fails. On the CPU they do so always.
        sync_batch_norm: whether batch norm in training normalises over the rows of all ranks, as over one batch. With
            False each rank's normalises over its own rows, as under DistributedDataParallel: no ranks wait for each
            other in it, but what a step computes then depends on how many they are (`ModelInfo.sharding` says so). The
            running statistics are those of rank 0's rows, as with DDP's broadcast_buffers. A rank with one value per
            channel refuses the batch. One rank, and a batch that one rank computes whole, are not concerned.
        compile: compile forward, loss and backward of training steps, as torch.compile does, for batches whose shapes
            repeat. Steps go on eagerly while that is done in the background; once what was compiled gives the same
            results but for rounding, steps of those shapes run on it, here and wherever the model comes back.
            `Model.info().compiled` says for which shapes, or why not. Not for architectures.
        wait_for_capacity: seconds that the model may wait until as many ranks and GPUs as it asks for are free, in the
            order of asking; the client's timeout counts from then. What it waits for is logged after a second, and
            `ModelInfo.waits_for` has it. Ctrl-C gives it up, and so does deleting the model. What the service could
            never give is refused at once. 0: so is what it cannot give now.

        Raises ExportError where the module or the loss cannot become a graph whose gradients are PyTorch's;
        InvalidArgument for an argument out of range; AlreadyExists where the id is taken; ResourceExhausted where the
        service has no room; FailedPrecondition where sharding is required and impossible.
        """
        model = create_model(
            self._rpc,
            module,
            example=example,
            loss=loss,
            optimizer=optimizer,
            workers=workers,
            model_id=model_id,
            seed=seed,
            device=device,
            gpus_per_worker=gpus_per_worker,
            require_sharding=require_sharding,
            on_nan=on_nan,
            labels=labels,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            precision=precision,
            loss_reduction=loss_reduction,
            loss_weight=loss_weight,
            durability=durability,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            deterministic=deterministic,
            sync_batch_norm=sync_batch_norm,
            compile=compile,
            wait_for_capacity=wait_for_capacity,
        )
        self._models.add(model)
        return model

    def get_model(self, model_id: str) -> Model:
        """The model of that id, made by whichever client. Raises ModelNotFound.

        Its module is not at hand: outputs come as tuples, lists and dicts, and a batch must fit one of the variants
        that the model has already.
        """
        request = pb.GetModelRequest(name=model_name(check_model_id(model_id)))
        model = Model(self._rpc, codec.decode_model_info(self._rpc.call("GetModel", request)))
        self._models.add(model)
        return model

    def list_models(self) -> list[ModelInfo]:
        """Every model of the service, ordered by id. `tensors` and `variants` are left empty."""
        models: list[ModelInfo] = []
        request, deadline = pb.ListModelsRequest(), Deadline(self._rpc.timeout)
        while True:
            reply = self._rpc.call("ListModels", request, deadline=deadline)
            models.extend(codec.decode_model_info(model) for model in reply.models)
            if not reply.next_page_token:
                return models
            request.page_token = reply.next_page_token

    def restore_model(
        self,
        checkpoint: Checkpoint | str,
        *,
        model_id: str | None = None,
        workers: int | None = None,
        wait_for_capacity: float = 0.0,
    ) -> Model:
        """Make a model of a checkpoint, which goes on as the saved one would have. Returns when it is ready.

        As with `get_model`, its module is not at hand.

        checkpoint: what `Model.save` or `list_checkpoints` gave, or its name. model_id: the saved model's where left
        out. workers: how many ranks; as many as it had where left out. With another number, sums may round differently
        from here on. wait_for_capacity: as for `create_model`.

        Raises CheckpointNotFound; AlreadyExists where the id is taken; ResourceExhausted where the service has no room;
        FailedPrecondition where the files cannot be read: CHECKPOINT_CORRUPT, or CHECKPOINT_VERSION for those of
        another version of the service.
        """
        model = Model(self._rpc, restore_model(self._rpc, checkpoint, model_id, workers, wait_for_capacity))
        self._models.add(model)
        return model

    def list_checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint of the service, ordered by name; those that it took by itself come last."""
        return list(list_checkpoints(self._rpc))

    def get_checkpoint(self, name: str) -> Checkpoint:
        """The checkpoint of that name. Raises CheckpointNotFound."""
        return get_checkpoint(self._rpc, name)

    def delete_checkpoint(self, name: Checkpoint | str) -> None:
        """Delete a checkpoint. Models that were made of it live on.

        Raises CheckpointNotFound; FailedPrecondition for one that a model would be brought back from after a failure.
        """
        delete_checkpoint(self._rpc, name)

    def upload_dataset(self, inputs: Any, targets: Any = None, *, dataset_id: str | None = None) -> Dataset:
        """Bring examples to the service, where they stay until they are deleted, to train on with `Model.fit`.

        inputs, targets: nested as a batch's are; dimension 0 of every tensor is the examples. dataset_id: 1 to 63 of
        [a-z0-9-], first a letter; chosen where left out.

        Raises InvalidArgument (DATASET_ROWS) where the tensors have different numbers of rows, or none; AlreadyExists;
        ResourceExhausted where the service has no room: HELD_BYTES_EXHAUSTED, STORAGE_FULL.
        """
        return upload_dataset(self._rpc, inputs, targets, dataset_id)

    def get_dataset(self, dataset_id: str) -> Dataset:
        """The dataset of that id, made by whichever client. Raises DatasetNotFound."""
        return get_dataset(self._rpc, dataset_id)

    def list_datasets(self) -> list[Dataset]:
        """Every dataset of the service, ordered by id."""
        return list(list_datasets(self._rpc))

    def server_info(self) -> ServerInfo:
        """Versions, limits and capacity of the service."""
        return codec.decode_server_info(self._rpc.call("GetServerInfo", pb.GetServerInfoRequest()))

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the client is closed."""
        self._on_close.append(as_function(callback, "callback"))

    def close(self) -> None:
        """End the client, and the service if `launch` made both. Calls that wait raise Cancelled. May be repeated.

        Models of a service that `connect` found live on. Does nothing in a forked child.
        """
        if not self._rpc.is_owner:
            return
        with self._closing:
            for model in list(self._models):
                model.futures.cancel()
            self._rpc.close()
            while self._on_close:
                self._on_close.pop()()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<gradwire.Client of {self._rpc.target}>"


class LossFunction(Protocol):
    """Any callable(outputs, targets) -> scalar; the losses of torch.nn are."""

    def __call__(self, outputs: Any, targets: Any, /) -> Any: ...
