"""What requests ask for beyond a batch, functions without a model, and what the service tells of itself."""

from __future__ import annotations

import re
from dataclasses import fields

from gradwire_proto.encoding.enum_words import DTYPES
from gradwire_proto.encoding.program_codec import decode_graphs, encode_program
from gradwire_proto.encoding.scalar_codec import check_integer, check_name, check_number, missing
from gradwire_proto.encoding.tensor_codec import (
    decode_named_tensors,
    encode_named_tensors,
)
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import (
    FunctionSpec,
    GradientQuery,
    Limits,
    Program,
    ServerInfo,
)

LONGEST_WAIT = 7 * 86_400
"""Seconds that a model may wait for capacity."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_LIMITS = tuple(limit.name for limit in fields(Limits))


def encode_wait(seconds: float, into: pb.CreateModelRequest | pb.RestoreModelRequest) -> None:
    """How long the model may wait for capacity; 0: not at all."""
    if seconds:
        into.wait_for_capacity.FromNanoseconds(round(seconds * 1e9))


def decode_wait(message: pb.CreateModelRequest | pb.RestoreModelRequest) -> float:
    """The seconds that a model may wait for capacity; 0: not at all."""
    seconds = message.wait_for_capacity.seconds + message.wait_for_capacity.nanos / 1e9
    if not 0 <= seconds <= LONGEST_WAIT:
        raise InvalidArgument(
            f"expected 0 to {LONGEST_WAIT} seconds, got {seconds:g}",
            field="wait_for_capacity",
            reason="NUMBER_OUT_OF_RANGE",
        )
    return seconds


def encode_function(value: FunctionSpec, into: pb.Function | None = None, field: str = "function") -> pb.Function:
    """The message of a function. A program of None leaves the digest alone to name it."""
    message = pb.Function() if into is None else into
    message.digest = value.digest
    message.output_leaf = value.output_leaf
    if value.program is not None:
        encode_program(value.program, message.program, f"{field}.program")
        encode_named_tensors(value.tensors, message.tensors)
    return message


def decode_function(message: pb.Function, field: str = "function", limits: Limits | None = None) -> FunctionSpec:
    """The function of a message: a digest, a program, or both. Parameters are refused: it has no state."""
    has_program = message.HasField("program")
    if (message.digest or not has_program) and not _DIGEST.fullmatch(message.digest):
        raise InvalidArgument(
            f"expected 64 hexadecimal digits in lower case, got {message.digest[:80]!r}",
            field=f"{field}.digest",
            reason="DIGEST_INVALID",
        )
    if message.tensors and not has_program:
        raise InvalidArgument(
            "tensors come with the program that uses them", field=f"{field}.tensors", reason="FIELD_NOT_SETTABLE"
        )
    program = None
    if has_program:
        program = decode_graphs(message.program, f"{field}.program", limits)
        _check_stateless(program, f"{field}.program.graphs")
    return FunctionSpec(
        digest=message.digest,
        program=program,
        tensors=decode_named_tensors(message.tensors, f"{field}.tensors", limits),
        output_leaf=check_integer(message.output_leaf, f"{field}.output_leaf", minimum=0),
    )


def _check_stateless(program: Program, field: str) -> None:
    if len(program.variants) != 1:
        raise InvalidArgument(
            f"expected one variant, got {len(program.variants)}", field=f"{field}.variants", reason="FUNCTION_INVALID"
        )
    for index, tensor in enumerate(program.tensors):
        if tensor.role != "constant":
            raise InvalidArgument(
                f"a function has constants only, not a {tensor.role}",
                field=f"{field}.tensors[{index}].role",
                reason="FUNCTION_INVALID",
            )


def encode_gradient_query(value: GradientQuery, into: pb.ComputeGradientsRequest) -> pb.ComputeGradientsRequest:
    """Write what is asked for into the request. `wrt=()` asks for no parameter gradients at all."""
    if value.wrt is not None:
        into.wrt.extend(value.wrt)
        into.no_parameter_gradients = not value.wrt
    into.input_gradients = value.input_gradients
    into.outputs = value.outputs
    into.eval_mode = not value.training
    if value.seed is not None:
        into.seed = check_integer(value.seed, "seed")
    into.per_example = value.per_example
    if value.gradient_dtype is not None:
        number = DTYPES.number(value.gradient_dtype, "gradient_dtype")
        into.gradient_dtype = number  # pyright: ignore[reportAttributeAccessIssue]
    into.top_k = value.top_k or 0.0
    return into


def decode_gradient_query(message: pb.ComputeGradientsRequest) -> GradientQuery:
    """What the request asks for."""
    if message.no_parameter_gradients and message.wrt:
        raise InvalidArgument(
            "expected either names in wrt or no_parameter_gradients, got both", field="wrt", reason="WRT_CONTRADICTION"
        )
    for index, name in enumerate(message.wrt):
        check_name(name, f"wrt[{index}]")
    _check_one_kind_of_gradient(message)
    if not 0.0 <= message.top_k <= 1.0:
        raise InvalidArgument(
            f"expected a fraction from 0 to 1, got {message.top_k}", field="top_k", reason="TOP_K_INVALID"
        )
    gradient_dtype = None
    if message.gradient_dtype:
        gradient_dtype = DTYPES.word(message.gradient_dtype, "gradient_dtype")
        if not gradient_dtype.startswith(("float", "bfloat", "complex")):
            raise InvalidArgument(
                f"expected a floating-point or complex type, got {gradient_dtype}",
                field="gradient_dtype",
                reason="DTYPE_NOT_DIFFERENTIABLE",
            )
    return GradientQuery(
        wrt=() if message.no_parameter_gradients else tuple(message.wrt) or None,
        input_gradients=message.input_gradients,
        outputs=message.outputs,
        training=not message.eval_mode,
        seed=message.seed if message.HasField("seed") else None,
        gradient_dtype=gradient_dtype,
        per_example=message.per_example,
        top_k=message.top_k or None,
    )


def _check_one_kind_of_gradient(message: pb.ComputeGradientsRequest) -> None:
    """Rows' own gradients and products with vectors are returned alone, and of models."""
    kind = "per_example" if message.per_example else "vectors" if message.vectors else None
    if kind is None:
        if message.top_k and message.WhichOneof("subject") == "function":
            raise InvalidArgument("a function has no parameters", field="top_k", reason="FUNCTION_INVALID")
        return
    others = ["input_gradients", "outputs", "top_k"]
    others += ["vectors"] if message.per_example else ["wrt", "no_parameter_gradients"]
    for other in others:
        if getattr(message, other):
            raise InvalidArgument(f"does not go together with {kind}", field=other, reason="GRADIENTS_CONTRADICTION")
    if message.WhichOneof("subject") == "function":
        raise InvalidArgument(f"a function has no {kind}: it has no parameters", field=kind, reason="FUNCTION_INVALID")


def decode_learning_rate(
    message: pb.TrainStepRequest | pb.OptimizerStepRequest, field: str = "learning_rate"
) -> float | None:
    """The learning rate that a request gives, finite and at least 0; None where it gives none."""
    return check_number(message.learning_rate, field) if message.HasField("learning_rate") else None


def decode_max_inline_bytes(number: int, field: str = "max_inline_bytes") -> int | None:
    """How many bytes of tensors an answer may carry; None for any number."""
    return check_integer(number, field, minimum=0) or None


def encode_limits(value: Limits, into: pb.Limits | None = None) -> pb.Limits:
    """The message of the service's limits."""
    message = pb.Limits() if into is None else into
    for name in _LIMITS:
        setattr(message, name, getattr(value, name))
    return message


def decode_limits(message: pb.Limits) -> Limits:
    """The service's limits."""
    return Limits(**{name: getattr(message, name) for name in _LIMITS})


def encode_server_info(value: ServerInfo, into: pb.GetServerInfoResponse | None = None) -> pb.GetServerInfoResponse:
    """The answer of GetServerInfo."""
    message = pb.GetServerInfoResponse() if into is None else into
    message.version = value.version
    message.torch_version = value.torch_version
    message.workers = value.workers
    message.free_workers = value.free_workers
    message.gpus = value.gpus
    encode_limits(value.limits, message.limits)
    message.local_socket = value.local_socket
    return message


def decode_server_info(message: pb.GetServerInfoResponse) -> ServerInfo:
    """What GetServerInfo answers."""
    if not message.HasField("limits"):
        raise missing("limits", "the service's limits")
    return ServerInfo(
        version=message.version,
        torch_version=message.torch_version,
        workers=message.workers,
        free_workers=message.free_workers,
        gpus=message.gpus,
        limits=decode_limits(message.limits),
        local_socket=message.local_socket,
    )
