"""Models, as asked for and as described, to messages and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.rpc import code_pb2, status_pb2

from gradwire_proto.encoding.enum_words import (
    DEVICES,
    DURABILITIES,
    LOSS_REDUCTIONS,
    MODEL_STATES,
    ON_NAN,
    PRECISIONS,
    SHARDING_MODES,
)
from gradwire_proto.encoding.kernels_codec import decode_compiled, encode_compiled
from gradwire_proto.encoding.optimizer_codec import decode_clip, decode_optimizer, encode_optimizer
from gradwire_proto.encoding.program_codec import (
    decode_program,
    decode_state_tensors,
    decode_variant,
    encode_program,
    encode_state_tensor,
    encode_variant,
)
from gradwire_proto.encoding.scalar_codec import (
    INT32_MAX,
    check_integer,
    check_name,
    check_number,
    decode_time,
    encode_time,
    entry,
    missing,
)
from gradwire_proto.encoding.tensor_codec import decode_options, encode_options
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import model_name
from gradwire_proto.v1 import model_pb2 as pb
from gradwire_proto.values import (
    GraphLossSpec,
    Limits,
    LossSpec,
    ModelInfo,
    ModelSpec,
    OptimizerSpec,
    OutputLossSpec,
    Sharding,
    TorchLossSpec,
)

MAX_LABELS, MAX_LABEL_LENGTH = 64, 63

_SET_BY_SERVER = (
    "name",
    "state",
    "step",
    "sharding",
    "parameter_count",
    "create_time",
    "last_error",
    "tensors",
    "variants",
    "rank_rows",
    "architecture",
    "compiled",
    "waits_for",
)


def encode_loss(value: LossSpec, into: pb.Loss | None = None, field: str = "loss") -> pb.Loss:
    """The message of a loss."""
    message = pb.Loss() if into is None else into
    if isinstance(value, TorchLossSpec):
        message.torch.name = value.name
        encode_options(value.options, message.torch.options, f"{field}.torch.options")
    elif isinstance(value, OutputLossSpec):
        message.output.output_leaf = value.output_leaf
    else:
        message.graph.SetInParent()
    return message


def decode_loss(message: pb.Loss, field: str = "loss", limits: Limits | None = None) -> LossSpec:
    """The loss of a message, which must be set. Whether torch has a loss of that name is for the ranks' table."""
    kind = message.WhichOneof("kind")
    if kind == "torch":
        name = check_name(message.torch.name, f"{field}.torch.name")
        return TorchLossSpec(name, decode_options(message.torch.options, f"{field}.torch.options", limits))
    if kind == "graph":
        return GraphLossSpec()
    if kind == "output":
        return OutputLossSpec(check_integer(message.output.output_leaf, f"{field}.output.output_leaf", minimum=0))
    raise missing(field, "a loss")


def encode_model_spec(value: ModelSpec, into: pb.Model | None = None, field: str = "model") -> pb.Model:
    """The message that asks for a model."""
    message = pb.Model() if into is None else into
    encode_program(value.program, message.program, f"{field}.program")
    if value.loss is not None:
        encode_loss(value.loss, message.loss, f"{field}.loss")
    if value.optimizer is not None:
        encode_optimizer(value.optimizer, message.optimizer, f"{field}.optimizer")
    message.workers = check_integer(value.workers, f"{field}.workers", minimum=1, maximum=INT32_MAX)
    message.device = DEVICES.number(value.device, f"{field}.device")  # pyright: ignore[reportAttributeAccessIssue]
    message.gpus_per_worker = value.gpus_per_worker
    message.seed = check_integer(value.seed, f"{field}.seed")
    message.on_nan = ON_NAN.number(value.on_nan, f"{field}.on_nan")  # pyright: ignore[reportAttributeAccessIssue]
    message.require_sharding = value.require_sharding
    message.labels.update(value.labels)
    _encode_clips(value, message)
    message.precision = PRECISIONS.number(value.precision, f"{field}.precision")  # pyright: ignore[reportAttributeAccessIssue]
    _encode_reduction(value, message)
    _encode_batch_norm(value, message)
    _encode_keeping(value, message, field)
    return message


def decode_model_spec(message: pb.Model, field: str = "model", limits: Limits | None = None) -> ModelSpec:
    """The model that a message asks for. Refuses fields that only the server sets."""
    for descriptor, _ in message.ListFields():
        if descriptor.name in _SET_BY_SERVER:
            raise InvalidArgument(
                "only the service sets this field", field=f"{field}.{descriptor.name}", reason="FIELD_NOT_SETTABLE"
            )
    if not message.HasField("program"):
        raise missing(f"{field}.program", "a program")
    device = DEVICES.word(message.device, f"{field}.device")
    _refuse_checkpoints_of_nothing(message, field)
    return ModelSpec(
        program=decode_program(message.program, f"{field}.program", limits),
        loss=decode_loss(message.loss, f"{field}.loss", limits) if message.HasField("loss") else None,
        optimizer=_decode_optional_optimizer(message, field, limits),
        workers=check_integer(message.workers, f"{field}.workers", minimum=0, maximum=INT32_MAX) or 1,
        device=device,
        gpus_per_worker=_decode_gpus(message.gpus_per_worker, device, f"{field}.gpus_per_worker"),
        seed=message.seed,
        on_nan=ON_NAN.word(message.on_nan, f"{field}.on_nan"),
        require_sharding=message.require_sharding,
        labels=decode_labels(message.labels, f"{field}.labels"),
        clip_grad_norm=decode_clip(message, "clip_grad_norm", f"{field}.clip_grad_norm"),
        clip_grad_value=decode_clip(message, "clip_grad_value", f"{field}.clip_grad_value"),
        precision=PRECISIONS.word(message.precision, f"{field}.precision"),
        loss_reduction=_decode_reduction(message, f"{field}.loss_reduction"),
        sync_batch_norm=_decode_batch_norm(message),
        **_decode_keeping(message, field),
    )


def _encode_keeping(value: ModelSpec | ModelInfo, message: pb.Model, field: str) -> None:
    number = DURABILITIES.number(value.durability, f"{field}.durability")
    message.durability = number  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("checkpoint_every", "keep_checkpoints"):
        setattr(message, name, check_integer(getattr(value, name), f"{field}.{name}", minimum=0, maximum=INT32_MAX))
    message.deterministic, message.compile = value.deterministic, value.compile


def _decode_keeping(message: pb.Model, field: str) -> dict[str, Any]:
    durability = DURABILITIES.word(message.durability, f"{field}.durability")
    counts = {
        name: check_integer(getattr(message, name), f"{field}.{name}", minimum=0)
        for name in ("checkpoint_every", "keep_checkpoints")
    }
    return {
        "durability": durability,
        "deterministic": message.deterministic,
        "compile": message.compile,
        **counts,
    }


def _refuse_checkpoints_of_nothing(message: pb.Model, field: str) -> None:
    if message.durability != pb.DURABILITY_NONE:
        return
    for name in ("checkpoint_every", "keep_checkpoints"):
        if getattr(message, name):
            raise InvalidArgument(
                "a model that is not durable has no automatic checkpoints: expected 0",
                field=f"{field}.{name}",
                reason="CHECKPOINTS_NOT_TAKEN",
            )


def _encode_clips(value: ModelSpec | ModelInfo, message: pb.Model) -> None:
    if value.clip_grad_norm is not None:
        message.clip_grad_norm = value.clip_grad_norm
    if value.clip_grad_value is not None:
        message.clip_grad_value = value.clip_grad_value


def _encode_reduction(value: ModelSpec | ModelInfo, message: pb.Model) -> None:
    if value.loss_reduction is not None:
        number = LOSS_REDUCTIONS.number(value.loss_reduction, "model.loss_reduction")
        message.loss_reduction = number  # pyright: ignore[reportAttributeAccessIssue]


def _decode_reduction(message: pb.Model, field: str) -> str | None:
    return LOSS_REDUCTIONS.word(message.loss_reduction, field) if message.loss_reduction else None


def _encode_batch_norm(value: ModelSpec | ModelInfo, message: pb.Model) -> None:
    if not value.sync_batch_norm:
        message.sync_batch_norm = False


def _decode_batch_norm(message: pb.Model) -> bool:
    # Left out by clients that do not know it, and in what was stored before there was a choice.
    return not message.HasField("sync_batch_norm") or message.sync_batch_norm


def _decode_optional_optimizer(message: pb.Model, field: str, limits: Limits | None) -> OptimizerSpec | None:
    return decode_optimizer(message.optimizer, f"{field}.optimizer", limits) if message.HasField("optimizer") else None


def _decode_gpus(gpus: float, device: str, field: str) -> float:
    check_number(gpus, field)
    if device == "cuda":
        return gpus or 1.0
    if device == "cpu" and gpus:
        raise InvalidArgument(
            f"expected 0 where the device is the CPU, got {gpus:g}", field=field, reason="GPUS_ON_CPU"
        )
    return gpus


def decode_labels(labels: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """The labels of a message: at most 64, keys and values of at most 63 characters."""
    if len(labels) > MAX_LABELS:
        raise InvalidArgument(
            f"expected at most {MAX_LABELS} labels, got {len(labels)}", field=field, reason="TOO_MANY_LABELS"
        )
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_LENGTH or len(value) > MAX_LABEL_LENGTH:
            raise InvalidArgument(
                f"expected keys of 1 to {MAX_LABEL_LENGTH} characters and values of at most {MAX_LABEL_LENGTH}",
                field=entry(field, key[:MAX_LABEL_LENGTH]),
                reason="LABEL_TOO_LONG",
            )
    return dict(labels)


def encode_model_info(value: ModelInfo, into: pb.Model | None = None) -> pb.Model:
    """The message that describes a model."""
    message = pb.Model() if into is None else into
    message.name = model_name(value.id)
    message.state = MODEL_STATES.number(value.state, "state")  # pyright: ignore[reportAttributeAccessIssue]
    message.step = value.step
    message.workers = value.workers
    if value.sharding is not None:
        mode = SHARDING_MODES.number(value.sharding.mode, "sharding.mode")
        message.sharding.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
        message.sharding.reason = value.sharding.reason
    message.parameter_count = value.num_parameters
    if value.optimizer is not None:
        encode_optimizer(value.optimizer, message.optimizer)
    if value.loss is not None:
        encode_loss(value.loss, message.loss)
    message.labels.update(value.labels)
    encode_time(value.created_at, message.create_time)
    if value.last_error is not None:
        message.last_error.CopyFrom(status_pb2.Status(code=code_pb2.UNKNOWN, message=value.last_error))
    message.device = DEVICES.number(value.device, "device")  # pyright: ignore[reportAttributeAccessIssue]
    message.seed = value.seed
    message.on_nan = ON_NAN.number(value.on_nan, "on_nan")  # pyright: ignore[reportAttributeAccessIssue]
    for tensor in value.tensors:
        encode_state_tensor(tensor, message.tensors.add())
    for variant in value.variants:
        encode_variant(variant, message.variants.add())
    message.rank_rows.extend(value.rank_rows)
    message.architecture = value.architecture or ""
    _encode_clips(value, message)
    message.precision = PRECISIONS.number(value.precision, "precision")  # pyright: ignore[reportAttributeAccessIssue]
    _encode_reduction(value, message)
    _encode_batch_norm(value, message)
    _encode_keeping(value, message, "model")
    for kernels in value.compiled:
        encode_compiled(kernels, message.compiled.add())
    message.waits_for = value.waits_for
    return message


def decode_model_info(message: pb.Model, field: str = "model") -> ModelInfo:
    """The model that a message describes."""
    sharding = None
    if message.HasField("sharding"):
        mode = SHARDING_MODES.word(message.sharding.mode, f"{field}.sharding.mode")
        sharding = Sharding(mode, message.sharding.reason)
    return ModelInfo(
        id=message.name.removeprefix("models/"),
        state=MODEL_STATES.word(message.state, f"{field}.state"),
        step=message.step,
        workers=message.workers,
        sharding=sharding,
        num_parameters=message.parameter_count,
        optimizer=_decode_optional_optimizer(message, field, None),
        loss=decode_loss(message.loss, f"{field}.loss") if message.HasField("loss") else None,
        labels=dict(message.labels),
        created_at=decode_time(message.create_time),
        last_error=message.last_error.message if message.HasField("last_error") else None,
        device=DEVICES.word(message.device, f"{field}.device"),
        seed=message.seed,
        on_nan=ON_NAN.word(message.on_nan, f"{field}.on_nan"),
        tensors=decode_state_tensors(message.tensors, f"{field}.tensors"),
        variants=tuple(
            decode_variant(item, f"{field}.variants[{index}]", require_graph=False)
            for index, item in enumerate(message.variants)
        ),
        rank_rows=tuple(message.rank_rows),
        architecture=message.architecture or None,
        clip_grad_norm=decode_clip(message, "clip_grad_norm", f"{field}.clip_grad_norm"),
        clip_grad_value=decode_clip(message, "clip_grad_value", f"{field}.clip_grad_value"),
        precision=PRECISIONS.word(message.precision, f"{field}.precision"),
        loss_reduction=_decode_reduction(message, f"{field}.loss_reduction"),
        sync_batch_norm=_decode_batch_norm(message),
        compiled=tuple(
            decode_compiled(item, f"{field}.compiled[{index}]") for index, item in enumerate(message.compiled)
        ),
        waits_for=message.waits_for,
        **_decode_keeping(message, field),
    )
