"""Queries, and requests about checkpoints, that the codec refuses: by their field and the bound, never by a crash."""

from __future__ import annotations

from typing import Any

import pytest
from proto.codec_messages import INT64, refusal, smallest_variant

from gradwire_proto import codec, errors, values
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2


def derivative_request(kind: str, **fields: Any) -> pb.DifferentiateFunctionRequest:
    request = pb.DifferentiateFunctionRequest(differentiated_outputs=1, wrt=[0])
    request.derivative = pb.Derivative.Value(f"DERIVATIVE_{kind}")
    for name, value in fields.items():
        field = getattr(request, name)
        if isinstance(value, list):
            del field[:]
            field.extend(value)
        else:
            setattr(request, name, value)
    return request


VECTOR = tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, data=bytes(4))


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.DifferentiateFunctionRequest(wrt=[0], differentiated_outputs=1), "ENUM_VALUE_UNKNOWN", "derivative"),
        (derivative_request("JACOBIAN", wrt=[]), "WRT_INVALID", "wrt"),
        (derivative_request("JACOBIAN", wrt=[1, 1]), "WRT_INVALID", "wrt"),
        (derivative_request("JACOBIAN", wrt=[0, -1]), "INTEGER_OUT_OF_RANGE", "wrt[1]"),
        (derivative_request("NONE"), "WRT_INVALID", "wrt"),
        (derivative_request("JACOBIAN", differentiated_outputs=0), "INTEGER_OUT_OF_RANGE", "differentiated_outputs"),
        (derivative_request("JACOBIAN", chunk_size=-1), "INTEGER_OUT_OF_RANGE", "chunk_size"),
        (derivative_request("HESSIAN", chunk_size=2), "FIELD_NOT_SETTABLE", "chunk_size"),
        (derivative_request("VJP", strict=True, vectors=[VECTOR]), "FIELD_NOT_SETTABLE", "strict"),
        (derivative_request("HESSIAN", vectors=[VECTOR]), "VECTORS_MISMATCH", "vectors"),
        (derivative_request("VJP", differentiated_outputs=2, vectors=[VECTOR]), "VECTORS_MISMATCH", "vectors"),
        (derivative_request("JVP", wrt=[0, 1], vectors=[VECTOR]), "VECTORS_MISMATCH", "vectors"),
        (derivative_request("HVP", vectors=[tensor_pb2.Tensor()]), "ENUM_VALUE_UNKNOWN", "vectors[0].dtype"),
    ],
)
def test_derivative_is_refused_what_it_has_no_use_for(
    request_: pb.DifferentiateFunctionRequest, reason: str, field: str
) -> None:
    error = refusal(lambda: codec.decode_derivative_query(request_))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize("path", ["function.output_leaf", "batch.targets"])
def test_derivative_of_a_function_takes_neither_targets_nor_an_output_leaf(path: str) -> None:
    request = derivative_request("JACOBIAN")
    if path == "batch.targets":
        request.batch.targets.integer = 1
    else:
        request.function.output_leaf = 1
    error = refusal(lambda: codec.decode_derivative_query(request))
    assert (error.reason, error.field) == ("FIELD_NOT_SETTABLE", path)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.ComputeGradientsRequest(wrt=["a"], no_parameter_gradients=True), "WRT_CONTRADICTION", "wrt"),
        (pb.ComputeGradientsRequest(wrt=["a", ""]), "NAME_MISSING", "wrt[1]"),
        (
            pb.ComputeGradientsRequest(gradient_dtype=INT64),
            "DTYPE_NOT_DIFFERENTIABLE",
            "gradient_dtype",
        ),
        (pb.ComputeGradientsRequest(gradient_dtype=99), "ENUM_VALUE_UNKNOWN", "gradient_dtype"),  # type: ignore[arg-type]
        (pb.ComputeGradientsRequest(per_example=True, outputs=True), "GRADIENTS_CONTRADICTION", "outputs"),
        (
            pb.ComputeGradientsRequest(per_example=True, input_gradients=True),
            "GRADIENTS_CONTRADICTION",
            "input_gradients",
        ),
        (
            pb.ComputeGradientsRequest(per_example=True, vectors=[tensor_pb2.NamedTensor()]),
            "GRADIENTS_CONTRADICTION",
            "vectors",
        ),
        (
            pb.ComputeGradientsRequest(wrt=["a"], vectors=[tensor_pb2.NamedTensor()]),
            "GRADIENTS_CONTRADICTION",
            "wrt",
        ),
        (
            pb.ComputeGradientsRequest(no_parameter_gradients=True, vectors=[tensor_pb2.NamedTensor()]),
            "GRADIENTS_CONTRADICTION",
            "no_parameter_gradients",
        ),
        (pb.ComputeGradientsRequest(function=pb.Function(), per_example=True), "FUNCTION_INVALID", "per_example"),
    ],
)
def test_query_that_contradicts_itself_is_refused(
    request_: pb.ComputeGradientsRequest, reason: str, field: str
) -> None:
    error = refusal(lambda: codec.decode_gradient_query(request_))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.RestoreModelRequest(), "NAME_INVALID", "checkpoint"),
        (pb.RestoreModelRequest(checkpoint="../etc"), "NAME_INVALID", "checkpoint"),
        (pb.RestoreModelRequest(checkpoint="checkpoints/.."), "CHECKPOINT_NOT_FOUND", "checkpoint"),
        (pb.RestoreModelRequest(checkpoint="checkpoints/c", model_id="9"), "MODEL_ID_INVALID", "model_id"),
        (pb.RestoreModelRequest(checkpoint="checkpoints/c", workers=-1), "INTEGER_OUT_OF_RANGE", "workers"),
    ],
)
def test_restoration_of_what_cannot_be_is_refused(request_: pb.RestoreModelRequest, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_restoration(request_))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.CreateCheckpointRequest(), "NAME_INVALID", "parent"),
        (pb.CreateCheckpointRequest(parent="models/m", checkpoint_id="a/b"), "CHECKPOINT_ID_INVALID", "checkpoint_id"),
        (pb.CreateCheckpointRequest(parent="models/m", checkpoint_id="A"), "CHECKPOINT_ID_INVALID", "checkpoint_id"),
    ],
)
def test_checkpoint_of_a_name_that_could_leave_its_folder_is_refused(
    request_: pb.CreateCheckpointRequest, reason: str, field: str
) -> None:
    error = refusal(lambda: codec.decode_new_checkpoint(request_))
    assert (error.reason, error.field) == (reason, field)


def test_what_a_checkpoint_request_leaves_out_is_none() -> None:
    assert codec.decode_new_checkpoint(pb.CreateCheckpointRequest(parent="models/m")) == ("m", None)
    asked = pb.RestoreModelRequest(checkpoint="models/m/checkpoints/7", model_id="copy", workers=3)
    assert codec.decode_restoration(asked) == ("m/7", "copy", 3)
    assert codec.decode_restoration(pb.RestoreModelRequest(checkpoint="checkpoints/c")) == ("c", None, None)


def test_inline_bound_of_zero_means_none() -> None:
    assert codec.decode_max_inline_bytes(0) is None
    assert codec.decode_max_inline_bytes(5) == 5
    assert refusal(lambda: codec.decode_max_inline_bytes(-1)).field == "max_inline_bytes"


@pytest.mark.parametrize(
    ("function", "reason", "field"),
    [
        (pb.Function(), "DIGEST_INVALID", "function.digest"),
        (pb.Function(digest="0" * 63 + "G"), "DIGEST_INVALID", "function.digest"),
        (pb.Function(digest="0" * 64, tensors=[tensor_pb2.NamedTensor()]), "FIELD_NOT_SETTABLE", "function.tensors"),
        (pb.Function(digest="0" * 64, output_leaf=-1), "INTEGER_OUT_OF_RANGE", "function.output_leaf"),
    ],
)
def test_function_that_names_nothing_is_refused(function: pb.Function, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_function(function))
    assert (error.reason, error.field) == (reason, field)


def test_function_with_state_is_refused() -> None:
    weight = values.StateTensor(name="w", role="parameter", dtype="float32", shape=(1,))
    program = values.Program(torch_version="2", tensors=(weight,), variants=(smallest_variant(),), operators={})
    message = codec.encode_function(values.FunctionSpec(digest="0" * 64, program=program, tensors={}))
    error = refusal(lambda: codec.decode_function(message))
    assert (error.reason, error.field) == ("FUNCTION_INVALID", "function.program.graphs.tensors[0].role")


@pytest.mark.parametrize("top_k", [-0.1, 1.01, float("nan"), float("inf")])
def test_fraction_of_gradients_that_is_none_is_refused(top_k):
    with pytest.raises(errors.InvalidArgument) as caught:
        codec.decode_gradient_query(pb.ComputeGradientsRequest(name="models/a", top_k=top_k))
    assert (caught.value.field, caught.value.reason) == ("top_k", "TOP_K_INVALID")


@pytest.mark.parametrize("kind", ["per_example", "vectors", "function"])
def test_fraction_of_what_is_no_parameters_gradient_is_refused(kind):
    request = pb.ComputeGradientsRequest(name="models/a", top_k=0.5, per_example=kind == "per_example")
    if kind == "vectors":
        request.vectors.add(name="w")
    elif kind == "function":
        request.function.SetInParent()
    with pytest.raises(errors.InvalidArgument) as caught:
        codec.decode_gradient_query(request)
    assert caught.value.field == "top_k"
