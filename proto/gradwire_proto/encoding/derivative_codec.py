"""Derivatives of functions: what is asked for, and what is answered, to messages and back."""

from __future__ import annotations

from collections.abc import Sequence

from gradwire_proto.encoding.enum_words import DERIVATIVES
from gradwire_proto.encoding.result_codec import decode_timing, encode_timing
from gradwire_proto.encoding.scalar_codec import check_integer
from gradwire_proto.encoding.tensor_codec import decode_tensor, decode_value, encode_tensor, encode_value
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import DerivativeQuery, DerivativeResult, Limits, TensorData

_TAKE_VECTORS = ("vjp", "jvp", "hvp")


def encode_derivative_query(
    value: DerivativeQuery, vectors: Sequence[TensorData], into: pb.DifferentiateFunctionRequest
) -> pb.DifferentiateFunctionRequest:
    """Write what is asked for into the request."""
    into.derivative = DERIVATIVES.number(value.kind, "derivative")  # pyright: ignore[reportAttributeAccessIssue]
    into.wrt.extend(value.wrt)
    into.differentiated_outputs = value.outputs
    for vector in vectors:
        encode_tensor(vector, into.vectors.add())
    into.chunk_size = value.chunk_size or 0
    into.strict = value.strict
    if value.seed is not None:
        into.seed = check_integer(value.seed, "seed")
    return into


def decode_derivative_query(
    message: pb.DifferentiateFunctionRequest, limits: Limits | None = None
) -> tuple[DerivativeQuery, tuple[TensorData, ...]]:
    """(what the request asks for, its vectors). Refuses what the derivative has no use for."""
    kind = DERIVATIVES.word(message.derivative, "derivative")
    _check_used(message, kind)
    wrt = tuple(check_integer(leaf, f"wrt[{index}]", minimum=0) for index, leaf in enumerate(message.wrt))
    if len(set(wrt)) < len(wrt):
        raise InvalidArgument("names an input twice", field="wrt", reason="WRT_INVALID")
    outputs = check_integer(message.differentiated_outputs, "differentiated_outputs", minimum=1)
    expected = (outputs if kind == "vjp" else len(wrt)) if kind in _TAKE_VECTORS else 0
    if len(message.vectors) != expected:
        raise InvalidArgument(
            f"a {kind} of {outputs} outputs and {len(wrt)} inputs takes {expected} vectors, got {len(message.vectors)}",
            field="vectors",
            reason="VECTORS_MISMATCH",
        )
    vectors = tuple(decode_tensor(each, f"vectors[{index}]", limits) for index, each in enumerate(message.vectors))
    query = DerivativeQuery(
        kind=kind,
        wrt=wrt,
        outputs=outputs,
        chunk_size=check_integer(message.chunk_size, "chunk_size", minimum=0) or None,
        strict=message.strict,
        seed=message.seed if message.HasField("seed") else None,
    )
    return query, vectors


def _check_used(message: pb.DifferentiateFunctionRequest, kind: str) -> None:
    if message.function.output_leaf:
        raise InvalidArgument(
            "differentiated_outputs says which outputs are differentiated",
            field="function.output_leaf",
            reason="FIELD_NOT_SETTABLE",
        )
    if message.batch.HasField("targets"):
        raise InvalidArgument("a function has no targets", field="batch.targets", reason="FIELD_NOT_SETTABLE")
    for field, taken_by in (("chunk_size", "jacobian"), ("strict", "jvp")):
        if getattr(message, field) and kind != taken_by:
            raise InvalidArgument(f"only a {taken_by} takes it", field=field, reason="FIELD_NOT_SETTABLE")
    if bool(message.wrt) is (kind == "none"):
        wanted = "no input" if kind == "none" else "at least one input"
        raise InvalidArgument(f"expected {wanted} to differentiate", field="wrt", reason="WRT_INVALID")


def encode_derivative_result(
    value: DerivativeResult, into: pb.DifferentiateFunctionResponse | None = None
) -> pb.DifferentiateFunctionResponse:
    """The answer of DifferentiateFunction."""
    message = pb.DifferentiateFunctionResponse() if into is None else into
    encode_value(value.outputs, message.outputs, "outputs")
    for tensor in value.derivatives:
        encode_tensor(tensor, message.derivatives.add())
    encode_timing(value.timing, message.timing)
    return message


def decode_derivative_result(message: pb.DifferentiateFunctionResponse) -> DerivativeResult:
    """What DifferentiateFunction answers. Tensors are TensorData, of bytes or of a Handle."""
    return DerivativeResult(
        outputs=decode_value(message.outputs, "outputs"),
        derivatives=tuple(
            decode_tensor(tensor, f"derivatives[{index}]") for index, tensor in enumerate(message.derivatives)
        ),
        timing=decode_timing(message.timing),
    )
