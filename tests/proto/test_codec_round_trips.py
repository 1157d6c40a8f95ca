"""Every value of the contract comes back from the wire as it was, for values that hypothesis makes up."""

from __future__ import annotations

import timeit

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from proto.made_up_models import (
    MODEL_INFOS,
    MODEL_UPDATES,
    PAIRS,
    RETAINED,
    WRT,
)
from proto.made_up_programs import (
    COUNTS,
    INT64,
    NAMED_TENSORS,
    NAMES,
    OPTIONS,
    TEXTS,
    tensors,
)

from gradwire_proto import codec, values
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import program_pb2

EXAMPLES = settings(max_examples=25, deadline=None)
# Their parts are tested by themselves.
FEW_EXAMPLES = settings(max_examples=8, deadline=None)
WHOLES = ("variant", "program", "model_spec", "function")
SPECIAL = {
    "wait",
    "model_update",
    "model_info",
    "named_tensors",
    "operators",
    "gradient_query",
    "derivative_query",
    "backward_query",
    "cotangents",
    "group_options",
    # In test_datasets.py.
    "dataset",
    "fit_plan",
    "fit_progress",
    "fit_steps",
}


def through_the_wire(message: Message) -> Message:
    return type(message).FromString(message.SerializeToString())


def test_every_encoder_and_decoder_is_tested() -> None:
    public = {name.removeprefix("encode_") for name in codec.__all__ if name.startswith("encode_")}
    assert public == set(PAIRS) | SPECIAL


# Values are compared as they print: NaN equals itself there, and -0.0, tuples and bools stay what they are.
def assert_comes_back(kind: str, value: object) -> None:
    message = getattr(codec, f"encode_{kind}")(value)
    assert repr(getattr(codec, f"decode_{kind}")(through_the_wire(message))) == repr(value)


@pytest.mark.parametrize("kind", [kind for kind in PAIRS if kind not in WHOLES])
@EXAMPLES
@given(data=st.data())
def test_value_comes_back_as_it_was(kind: str, data: st.DataObject) -> None:
    assert_comes_back(kind, data.draw(PAIRS[kind]))


@pytest.mark.parametrize("kind", WHOLES)
@FEW_EXAMPLES
@given(data=st.data())
def test_value_of_many_parts_comes_back_as_it_was(kind: str, data: st.DataObject) -> None:
    assert_comes_back(kind, data.draw(PAIRS[kind]))


@FEW_EXAMPLES
@given(value=MODEL_INFOS)
def test_model_info_comes_back_with_variants_that_lack_graphs(value: values.ModelInfo) -> None:
    assert repr(codec.decode_model_info(through_the_wire(codec.encode_model_info(value)))) == repr(value)


@EXAMPLES
@given(value=NAMED_TENSORS)
def test_named_tensors_keep_names_and_order(value: values.NamedTensors) -> None:
    request = pb.LoadStateDictRequest()
    codec.encode_named_tensors(value, request.tensors)
    assert list(codec.decode_named_tensors(through_the_wire(request).tensors).items()) == list(value.items())
    assert list(codec.encode_named_tensors(value)) == list(request.tensors)


@EXAMPLES
@given(value=st.dictionaries(NAMES, TEXTS, max_size=4))
def test_operators_keep_their_schemas(value: dict[str, str]) -> None:
    program = program_pb2.GraphProgram()
    codec.encode_operators(value, program.operators)
    assert codec.decode_operators(through_the_wire(program).operators) == value


@EXAMPLES
@given(
    value=st.builds(
        values.GradientQuery,
        wrt=st.none() | st.lists(NAMES, max_size=3).map(tuple),
        input_gradients=st.booleans(),
        outputs=st.booleans(),
        training=st.booleans(),
        seed=st.none() | INT64,
        gradient_dtype=st.none() | st.sampled_from(["float64", "bfloat16", "complex64"]),
    )
)
def test_gradient_query_tells_all_gradients_from_none(value: values.GradientQuery) -> None:
    request = codec.encode_gradient_query(value, pb.ComputeGradientsRequest())
    assert codec.decode_gradient_query(through_the_wire(request)) == value


@EXAMPLES
@given(value=MODEL_UPDATES)
def test_model_update_tells_what_is_left_out_from_what_is_empty(value: values.ModelUpdate) -> None:
    request = codec.encode_model_update(value, pb.UpdateModelRequest())
    assert repr(codec.decode_model_update(through_the_wire(request))) == repr(value)


@EXAMPLES
@given(
    query=st.builds(
        values.BackwardQuery, retained=RETAINED, wrt=WRT, input_gradients=st.booleans(), keep=st.booleans()
    ),
    cotangents=st.tuples(tensors(), st.none() | tensors()).map(list),
    groups=st.lists(OPTIONS, max_size=3).map(tuple),
)
def test_backward_and_the_options_of_groups_come_back_as_they_were(
    query: values.BackwardQuery, cotangents: list, groups: tuple
) -> None:
    request = codec.encode_backward_query(query, pb.BackwardRequest())
    codec.encode_cotangents(cotangents, request)
    assert codec.decode_backward_query(through_the_wire(request)) == query
    assert repr(codec.decode_cotangents(through_the_wire(request))) == repr(cotangents)
    step = pb.OptimizerStepRequest()
    codec.encode_group_options(groups, step)
    assert repr(codec.decode_group_options(through_the_wire(step))) == repr(groups)


@pytest.mark.parametrize("wrt", [None, ("a", "b*")])
def test_query_for_each_examples_own_gradients_comes_back(wrt: tuple[str, ...] | None) -> None:
    query = values.GradientQuery(wrt=wrt, per_example=True, seed=3)
    request = codec.encode_gradient_query(query, pb.ComputeGradientsRequest())
    assert codec.decode_gradient_query(through_the_wire(request)) == query


def test_some_elements_of_gradients_come_back() -> None:
    query = values.GradientQuery(top_k=0.25, seed=3)
    request = codec.encode_gradient_query(query, pb.ComputeGradientsRequest())
    assert codec.decode_gradient_query(through_the_wire(request)) == query
    indices, elements = (values.TensorData(dtype, (1,), bytes(8)) for dtype in ("int64", "float64"))
    apart = values.TensorData("float64", (1,), values.Handle("downloads/a/tensors/0"))
    gradients = {"w": ((2, 3), indices, elements), "b": ((), indices, apart)}
    result = values.GradientResult(loss=0.5, step=1, num_examples=2, gradients=gradients)
    assert codec.decode_gradient_result(through_the_wire(codec.encode_gradient_result(result))) == result


@EXAMPLES
@given(
    kind=st.sampled_from(["none", "vjp", "jvp", "jacobian", "hessian", "hvp"]),
    wrt=st.lists(COUNTS, min_size=1, max_size=3, unique=True).map(tuple),
    outputs=st.integers(1, 3),
    bound=st.none() | st.integers(1, 2**62),
    strict=st.booleans(),
    seed=st.none() | INT64,
    data=st.data(),
)
def test_derivative_query_comes_back_with_its_vectors(kind, wrt, outputs, bound, strict, seed, data) -> None:
    query = values.DerivativeQuery(
        kind=kind,
        wrt=() if kind == "none" else wrt,
        outputs=outputs,
        chunk_size=bound if kind == "jacobian" else None,
        strict=strict and kind == "jvp",
        seed=seed,
    )
    count = {"vjp": outputs, "jvp": len(wrt), "hvp": len(wrt)}.get(kind, 0)
    vectors = tuple(data.draw(tensors()) for _ in range(count))
    request = codec.encode_derivative_query(query, vectors, pb.DifferentiateFunctionRequest())
    assert repr(codec.decode_derivative_query(through_the_wire(request))) == repr((query, vectors))


def test_model_that_is_not_durable_comes_back_so() -> None:
    spec = values.ModelSpec(program=values.ArchitectureSpec(name="gpt2"), durability="none")
    assert codec.decode_model_spec(through_the_wire(codec.encode_model_spec(spec))) == spec


def test_filling_a_field_in_place_gives_the_same_message() -> None:
    batch = values.Batch((values.TensorData("float32", (2,), bytes(8)), [], {}), {"y": None})
    request = pb.TrainStepRequest()
    codec.encode_batch(batch, request.batch)
    assert request.batch == codec.encode_batch(batch)
    assert codec.decode_batch(through_the_wire(request).batch) == batch


def test_segment_is_sent_as_its_bytes(tmp_path) -> None:
    path = tmp_path / "segment"
    path.write_bytes(bytes(range(16)))
    value = values.TensorData("int32", (2,), values.Segment(str(path), 4, 8))
    assert codec.decode_tensor(codec.encode_tensor(value)).data == bytes(range(4, 12))


def test_train_step_request_is_read_in_tens_of_microseconds() -> None:
    request = pb.TrainStepRequest(name="models/digits", request_id="5f8d1c1e-5c9c-4d0e-9a53-6b1f2c3d4e5f")
    batch = values.Batch(
        tuple(values.TensorData("float32", (64, 64), bytes(64 * 64 * 4)) for _ in range(3)),
        values.TensorData("int64", (64,), bytes(64 * 8)),
    )
    codec.encode_batch(batch, request.batch)
    wire, limits = request.SerializeToString(), values.Limits()

    def read() -> None:
        codec.decode_batch(pb.TrainStepRequest.FromString(wire).batch, "batch", limits)

    # The shortest of many short runs: the machine is shared.
    best = min(timeit.repeat(read, number=10, repeat=200)) / 10
    assert best < 100e-6, f"{best * 1e6:.0f} us"


@pytest.mark.parametrize("kind", [pb.CreateModelRequest, pb.RestoreModelRequest])
@given(seconds=st.integers(0, codec.LONGEST_WAIT * 1000).map(lambda ms: ms / 1000))
def test_how_long_a_model_may_wait_comes_back_as_it_was(kind: type, seconds: float) -> None:
    message = kind()
    codec.encode_wait(seconds, message)
    assert codec.decode_wait(through_the_wire(message)) == pytest.approx(seconds, rel=1e-12)
    assert message.HasField("wait_for_capacity") == (seconds > 0)
