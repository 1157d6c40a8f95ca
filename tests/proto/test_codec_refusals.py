"""What the codec refuses: by a typed error with the path of the field and the bound, never by a crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gradwire_proto import codec, values
from gradwire_proto.errors import GradwireError, InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2, program_pb2, tensor_pb2

FLOAT32, INT64 = tensor_pb2.DTYPE_FLOAT32, tensor_pb2.DTYPE_INT64
BUFFER = program_pb2.TENSOR_ROLE_BUFFER
UNKNOWN_FIELD = bytes([0xF8, 0x3F, 0x01])  # Field number 1023, a varint of 1.


def tensor(dtype: int = FLOAT32, shape: tuple[int, ...] = (2,), **content: object) -> tensor_pb2.Tensor:
    return tensor_pb2.Tensor(dtype=dtype, shape=shape, **content)  # type: ignore[arg-type]


def refusal(decode: Callable[[], object]) -> GradwireError:
    with pytest.raises(GradwireError) as caught:
        decode()
    return caught.value


@pytest.mark.parametrize(
    ("message", "reason", "field"),
    [
        (tensor(data=bytes(7)), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(data=bytes(9)), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(shape=(0,), data=b"x"), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(shape=(2**40, 2**40), data=b""), "TENSOR_SIZE_MISMATCH", "t"),
        (tensor(dtype=0, data=bytes(8)), "ENUM_VALUE_UNKNOWN", "t.dtype"),
        (tensor(dtype=99, data=bytes(8)), "ENUM_VALUE_UNKNOWN", "t.dtype"),
        (tensor(shape=(-2,), data=bytes(8)), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(-1, -2), data=bytes(8)), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(0, 2**62, 2**62), data=b""), "SHAPE_INVALID", "t.shape"),
        (tensor(shape=(1,) * 65, data=bytes(4)), "SHAPE_INVALID", "t.shape"),
        (tensor(dtype=tensor_pb2.DTYPE_BOOL, data=b"\x01\x02"), "TENSOR_NOT_BOOL", "t"),
        (tensor(), "FIELD_MISSING", "t"),
        (tensor(handle="/etc/passwd"), "NAME_INVALID", "t"),
        (tensor(handle="uploads/../tensors/0"), "NAME_INVALID", "t"),
        (tensor(handle="uploads/a/tensors/-1"), "NAME_INVALID", "t"),
    ],
)
def test_tensor_that_contradicts_itself_is_refused(message: tensor_pb2.Tensor, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_tensor(message, "t"))
    assert isinstance(error, InvalidArgument)
    assert error.reason == reason
    assert error.field is not None and error.field.startswith(field)


def test_size_mismatch_names_both_sizes() -> None:
    error = refusal(lambda: codec.decode_tensor(tensor(shape=(2, 3), data=bytes(20)), "batch.inputs"))
    assert str(error) == "batch.inputs: float32[2, 3] has 24 bytes, got 20"


@pytest.mark.parametrize("content", [{"data": bytes(8)}, {"handle": "uploads/a/tensors/0"}])
def test_tensor_above_the_limit_is_refused_by_the_setting(content: dict) -> None:
    limits = values.Limits(tensor_bytes=7)
    error = refusal(lambda: codec.decode_tensor(tensor(**content), "t", limits))
    assert isinstance(error, ResourceExhausted)
    assert (error.reason, error.field) == ("TENSOR_TOO_LARGE", "t")
    assert "tensor_bytes" in str(error) and "7" in str(error)


def test_tensor_without_elements_may_leave_out_its_data() -> None:
    assert codec.decode_tensor(tensor(shape=(0, 3))) == values.TensorData("float32", (0, 3), b"")


def test_path_leads_to_the_leaf_at_fault() -> None:
    good = values.TensorData("float32", (1,), bytes(4))
    message = codec.encode_batch(values.Batch({"x": (good, [good])}, good))
    message.inputs.dict.entries[0].value.tuple.items[1].list.items[0].tensor.data = b""
    assert refusal(lambda: codec.decode_batch(message)).field == "batch.inputs.x[1][0]"


def test_batch_without_inputs_is_refused() -> None:
    error = refusal(lambda: codec.decode_batch(tensor_pb2.Batch()))
    assert (error.field, error.reason) == ("batch.inputs", "FIELD_MISSING")


def test_name_or_key_that_stands_twice_is_refused() -> None:
    named = [tensor_pb2.NamedTensor(name="w", tensor=tensor(data=bytes(8)))] * 2
    error = refusal(lambda: codec.decode_named_tensors(named))
    assert (error.field, error.reason) == ('tensors["w"]', "DUPLICATE_NAME")
    value = tensor_pb2.Value()
    for _ in range(2):
        value.dict.entries.add(key="k").value.integer = 1
    assert refusal(lambda: codec.decode_value(value)).reason == "DUPLICATE_NAME"


def test_nameless_tensor_is_refused_by_its_index() -> None:
    error = refusal(lambda: codec.decode_named_tensors([tensor_pb2.NamedTensor()]))
    assert (error.field, error.reason) == ("tensors[0].name", "NAME_MISSING")


def test_nesting_is_bounded_both_ways_and_the_bound_passes_the_parser() -> None:
    value: values.Value = 1
    for _ in range(codec.MAX_DEPTH):
        value = {"k": value}
    request = pb.TrainStepRequest()
    codec.encode_value(value, request.batch.inputs)
    assert codec.decode_batch(pb.TrainStepRequest.FromString(request.SerializeToString()).batch).inputs == value
    assert refusal(lambda: codec.encode_value([value])).reason == "NESTING_TOO_DEEP"
    deeper = tensor_pb2.Value()
    codec.encode_value(value, deeper.list.items.add())
    assert refusal(lambda: codec.decode_value(deeper)).reason == "NESTING_TOO_DEEP"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"x": [object()]}, "VALUE_TYPE_UNSUPPORTED"),
        ({"x": [2**63]}, "INTEGER_OUT_OF_RANGE"),
        ({"x": ["\ud800"]}, "TEXT_NOT_UTF8"),
    ],
)
def test_value_that_cannot_travel_is_refused_by_its_path(value: dict, reason: str) -> None:
    error = refusal(lambda: codec.encode_value(value, field="v"))
    assert (error.field, error.reason) == ("v.x[0]", reason)


def test_key_that_is_no_string_is_refused() -> None:
    assert refusal(lambda: codec.encode_value({1: 2})).reason == "VALUE_TYPE_UNSUPPORTED"  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("decode", "empty"),
    [
        (codec.decode_value, tensor_pb2.Value()),
        (codec.decode_argument, program_pb2.Argument()),
        (codec.decode_structure, program_pb2.Structure()),
        (codec.decode_leaf, program_pb2.Leaf()),
        (codec.decode_graph_input, program_pb2.GraphInput()),
        (codec.decode_program, program_pb2.Program()),
        (codec.decode_program, program_pb2.Program(graphs=program_pb2.GraphProgram(torch_version="2"))),
        (codec.decode_variant, program_pb2.Variant(name="v")),
        (codec.decode_loss, model_pb2.Loss()),
        (codec.decode_model_spec, model_pb2.Model()),
    ],
)
def test_message_that_says_nothing_is_refused(decode: Callable, empty: object) -> None:
    error = refusal(lambda: decode(empty, "it"))
    assert error.reason == "FIELD_MISSING"
    assert error.field is not None and error.field.startswith("it")


@pytest.mark.parametrize("kind", ["dtype", "layout", "memory_format"])
@pytest.mark.parametrize("number", [0, 77])
def test_argument_of_an_unknown_enum_value_is_refused(kind: str, number: int) -> None:
    message = program_pb2.Argument(**{kind: number})  # type: ignore[arg-type]
    assert refusal(lambda: codec.decode_argument(message)).reason == "ENUM_VALUE_UNKNOWN"


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"role": 0}, "ENUM_VALUE_UNKNOWN", "tensor.role"),
        ({"name": ""}, "NAME_MISSING", "tensor.name"),
        (
            {"role": program_pb2.TENSOR_ROLE_BUFFER, "requires_grad": True},
            "GRADIENT_NOT_POSSIBLE",
            "tensor.requires_grad",
        ),
        ({"dtype": INT64, "requires_grad": True}, "GRADIENT_NOT_POSSIBLE", "tensor.requires_grad"),
        ({"shape": [-1]}, "SHAPE_INVALID", "tensor.shape"),
    ],
)
def test_state_tensor_that_cannot_be_is_refused(fields: dict, reason: str, field: str) -> None:
    good = {"name": "w", "role": program_pb2.TENSOR_ROLE_PARAMETER, "dtype": FLOAT32, "shape": [2]}
    error = refusal(lambda: codec.decode_state_tensor(program_pb2.StateTensor(**{**good, **fields})))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize("symbol", [{"min": -1}, {"min": 3, "max": 2}, {"max": -1}])
def test_symbol_with_impossible_bounds_is_refused(symbol: dict) -> None:
    message = program_pb2.Symbol(name="rows", **symbol)
    assert refusal(lambda: codec.decode_symbol(message)).reason == "INTEGER_OUT_OF_RANGE"


def test_bound_of_zero_is_refused_because_the_wire_reads_it_as_none() -> None:
    assert refusal(lambda: codec.encode_symbol(values.Symbol("rows", 0, 0))).reason == "INTEGER_OUT_OF_RANGE"


def smallest_variant(**changes: object) -> values.Variant:
    fields = {
        "name": "train",
        "training": True,
        "graph": values.Graph(("x",), (), (values.NodeRef("x"),)),
        "graph_inputs": (values.GraphInput("input", 0),),
        "input_structure": values.LeafRef(0),
        "input_leaves": (values.TensorSpec("float32", ("rows", 2)),),
        "output_structure": values.LeafRef(0),
    }
    return values.Variant(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", [(), values.LeafRef(1), (values.LeafRef(0), values.LeafRef(0))])
def test_structure_that_misses_or_repeats_a_leaf_is_refused(structure: values.Structure) -> None:
    message = codec.encode_variant(smallest_variant(input_structure=structure))
    error = refusal(lambda: codec.decode_variant(message))
    assert (error.reason, error.field) == ("STRUCTURE_INVALID", "variant.input_structure")


def test_leaf_that_is_a_constant_tensor_is_refused() -> None:
    message = program_pb2.Leaf(constant=tensor_pb2.Value(tensor=tensor(data=bytes(8))))
    assert refusal(lambda: codec.decode_leaf(message)).reason == "VALUE_TYPE_UNSUPPORTED"


NOT_DURABLE = model_pb2.DURABILITY_NONE


def model_message(**fields: object) -> model_pb2.Model:
    program = values.Program(torch_version="2", tensors=(), variants=(smallest_variant(),), operators={})
    message = codec.encode_model_spec(values.ModelSpec(program=program))
    message.MergeFrom(model_pb2.Model(**fields))  # type: ignore[arg-type]
    return message


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"workers": -2}, "INTEGER_OUT_OF_RANGE", "model.workers"),
        ({"device": 9}, "ENUM_VALUE_UNKNOWN", "model.device"),
        ({"on_nan": 9}, "ENUM_VALUE_UNKNOWN", "model.on_nan"),
        ({"precision": 9}, "ENUM_VALUE_UNKNOWN", "model.precision"),
        ({"loss_reduction": 9}, "ENUM_VALUE_UNKNOWN", "model.loss_reduction"),
        ({"durability": 9}, "ENUM_VALUE_UNKNOWN", "model.durability"),
        ({"checkpoint_every": -1}, "INTEGER_OUT_OF_RANGE", "model.checkpoint_every"),
        ({"keep_checkpoints": -1}, "INTEGER_OUT_OF_RANGE", "model.keep_checkpoints"),
        ({"durability": NOT_DURABLE, "checkpoint_every": 5}, "CHECKPOINTS_NOT_TAKEN", "model.checkpoint_every"),
        ({"durability": NOT_DURABLE, "keep_checkpoints": 5}, "CHECKPOINTS_NOT_TAKEN", "model.keep_checkpoints"),
        ({"gpus_per_worker": -1.0}, "NUMBER_OUT_OF_RANGE", "model.gpus_per_worker"),
        ({"gpus_per_worker": float("nan")}, "NUMBER_OUT_OF_RANGE", "model.gpus_per_worker"),
        ({"gpus_per_worker": 1.0, "device": model_pb2.DEVICE_CPU}, "GPUS_ON_CPU", "model.gpus_per_worker"),
        ({"labels": {"k": "v" * 64}}, "LABEL_TOO_LONG", 'model.labels["k"]'),
        ({"labels": {str(index): "" for index in range(65)}}, "TOO_MANY_LABELS", "model.labels"),
        ({"name": "models/mine"}, "FIELD_NOT_SETTABLE", "model.name"),
        ({"step": 3}, "FIELD_NOT_SETTABLE", "model.step"),
        ({"rank_rows": [1]}, "FIELD_NOT_SETTABLE", "model.rank_rows"),
    ],
)
def test_model_that_the_service_would_not_honour_is_refused(fields: dict, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_model_spec(model_message(**fields)))
    assert (error.reason, error.field) == (reason, field)


def test_model_that_leaves_settings_out_gets_the_documented_ones() -> None:
    message = model_message()
    message.ClearField("workers")
    spec = codec.decode_model_spec(message)
    assert (spec.workers, spec.device, spec.on_nan, spec.gpus_per_worker) == (1, "auto", "report", 0.0)
    message.device = model_pb2.DEVICE_CUDA
    assert codec.decode_model_spec(message).gpus_per_worker == 1.0


def test_field_that_a_newer_client_sends_is_refused_and_its_place_told() -> None:
    request = pb.TrainStepRequest.FromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(request))
    assert (error.reason, error.field) == ("UNKNOWN_FIELD", None)
    assert "TrainStepRequest has no field number 1023" in str(error)
    model = model_message()
    model.program.graphs.variants[0].graph.nodes.add().MergeFromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(model, "model"))
    assert (error.reason, error.field) == ("UNKNOWN_FIELD", "model.program.graphs.variants[0].graph.nodes[0]")
    codec.refuse_unknown_fields(model_message(labels={"a": "b"}))


def test_field_that_a_newer_client_sends_is_found_in_any_item_of_a_list() -> None:
    good = values.TensorData("float32", (1,), bytes(4))
    request = pb.TrainStepRequest(batch=codec.encode_batch(values.Batch({"x": (good, [good, good])}, good)))
    codec.refuse_unknown_fields(request)
    leaf = request.batch.inputs.dict.entries[0].value.tuple.items[1].list.items[1]
    leaf.MergeFromString(UNKNOWN_FIELD)
    error = refusal(lambda: codec.refuse_unknown_fields(request))
    assert (error.reason, error.field) == (
        "UNKNOWN_FIELD",
        "batch.inputs.dict.entries[0].value.tuple.items[1].list.items[1]",
    )


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
def test_bound_of_gradients_out_of_range_is_refused(name: str, bound: float) -> None:
    error = refusal(lambda: codec.decode_model_spec(model_message(**{name: bound})))
    assert (error.reason, error.field) == ("NUMBER_OUT_OF_RANGE", f"model.{name}")


def schedule_of_schedules(levels: int) -> model_pb2.Schedule:
    message = model_pb2.Schedule(name="ChainedScheduler")
    inner = message
    for _ in range(levels - 1):
        inner = inner.schedulers.add(name="ChainedScheduler")
    return message


@pytest.mark.parametrize(
    ("optimizer", "reason", "field"),
    [
        (model_pb2.Optimizer(), "NAME_MISSING", "optimizer.name"),
        (model_pb2.Optimizer(name="SGD", groups=[{}]), "NAME_MISSING", "optimizer.groups[0].pattern"),
        (model_pb2.Optimizer(name="SGD", schedule={}), "NAME_MISSING", "optimizer.schedule.name"),
        (
            model_pb2.Optimizer(name="SGD", schedule={"name": "ChainedScheduler", "schedulers": [{}]}),
            "NAME_MISSING",
            "optimizer.schedule.schedulers[0].name",
        ),
        (
            model_pb2.Optimizer(name="SGD", schedule=schedule_of_schedules(9)),
            "NESTING_TOO_DEEP",
            "optimizer.schedule" + 8 * ".schedulers[0]",
        ),
        (
            model_pb2.Optimizer(name="SGD", groups=[{"pattern": "*", "options": {"entries": [{"key": "lr"}]}}]),
            "FIELD_MISSING",
            "optimizer.groups[0].options.lr",
        ),
    ],
)
def test_optimizer_that_is_not_whole_is_refused(optimizer: model_pb2.Optimizer, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_optimizer(optimizer))
    assert (error.reason, error.field) == (reason, field)
    codec.decode_optimizer(model_pb2.Optimizer(name="SGD", schedule=schedule_of_schedules(8)))


def test_schedule_nested_too_deeply_is_refused_before_it_is_sent() -> None:
    nested = values.ScheduleSpec("StepLR")
    for _ in range(8):
        nested = values.ScheduleSpec("ChainedScheduler", {}, (nested,))
    error = refusal(lambda: codec.encode_optimizer(values.OptimizerSpec("SGD", schedule=nested)))
    assert error.reason == "NESTING_TOO_DEEP"


def test_state_of_an_optimizer_must_be_there() -> None:
    error = refusal(lambda: codec.decode_optimizer_state(pb.LoadOptimizerStateRequest()))
    assert (error.reason, error.field) == ("FIELD_MISSING", "state")


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.UpdateModelRequest(name="models/m"), "NOTHING_TO_UPDATE", None),
        (pb.UpdateModelRequest(learning_rate=-1.0), "NUMBER_OUT_OF_RANGE", "learning_rate"),
        (pb.UpdateModelRequest(learning_rate=float("nan")), "NUMBER_OUT_OF_RANGE", "learning_rate"),
        (pb.UpdateModelRequest(optimizer={}), "NAME_MISSING", "optimizer.name"),
        (pb.UpdateModelRequest(trainable=[{"trainable": True}]), "NAME_MISSING", "trainable[0].pattern"),
        (pb.UpdateModelRequest(trainable=[{"pattern": "*"}] * 1025), "TOO_MANY_PATTERNS", "trainable"),
        (pb.UpdateModelRequest(labels={"labels": {"": "x"}}), "LABEL_TOO_LONG", 'labels.labels[""]'),
        (pb.UpdateModelRequest(labels={"labels": {str(n): "" for n in range(65)}}), "TOO_MANY_LABELS", "labels.labels"),
    ],
)
def test_update_out_of_bounds_is_refused(request_: pb.UpdateModelRequest, reason: str, field: str | None) -> None:
    error = refusal(lambda: codec.decode_model_update(request_))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_learning_rate_out_of_range_is_refused(rate: float) -> None:
    error = refusal(lambda: codec.decode_learning_rate(pb.TrainStepRequest(learning_rate=rate)))
    assert (error.reason, error.field) == ("NUMBER_OUT_OF_RANGE", "learning_rate")


def test_learning_rate_of_zero_differs_from_none() -> None:
    assert codec.decode_learning_rate(pb.TrainStepRequest(learning_rate=0.0)) == 0.0
    assert codec.decode_learning_rate(pb.OptimizerStepRequest()) is None


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
