"""Every value of the contract comes back from the wire as it was, for values that hypothesis makes up."""

from __future__ import annotations

import timeit
from dataclasses import replace

import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwire_proto import codec, names, values
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import program_pb2

EXAMPLES = settings(max_examples=40, deadline=None)

NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
INT64 = st.integers(-(2**63), 2**63 - 1)
COUNTS = st.integers(0, 2**63 - 1)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
DTYPES = st.sampled_from(sorted(values.ITEM_SIZE))
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
HANDLES = st.builds(
    "{}/{}/tensors/{}".format, st.sampled_from(["uploads", "downloads"]), st.just("a-1_B"), COUNTS
).filter(lambda name: len(name) < 30)


@st.composite
def tensors(draw: st.DrawFn) -> values.TensorData:
    dtype, shape = draw(DTYPES), draw(SHAPES)
    size = values.TensorData(dtype, shape, b"").nbytes
    if draw(st.integers(0, 9)) == 0:
        return values.TensorData(dtype, shape, values.Handle(draw(HANDLES)))
    data = draw(st.binary(min_size=size, max_size=size))
    return values.TensorData(dtype, shape, bytes(byte & 1 for byte in data) if dtype == "bool" else data)


NAMED_TENSORS = st.dictionaries(NAMES, tensors(), max_size=4)
CONSTANTS = st.one_of(st.booleans(), INT64, FLOATS, TEXTS)


def nested(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves | st.none(),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3).map(tuple),
            st.lists(inner, max_size=3),
            st.dictionaries(TEXTS, inner, max_size=3),
        ),
        max_leaves=6,
    )


VALUES = nested(tensors() | CONSTANTS)
OPTIONS = st.dictionaries(NAMES, VALUES, max_size=3)
ARGUMENTS = st.recursive(
    st.one_of(
        st.none(),
        CONSTANTS,
        st.complex_numbers(),
        st.builds(values.NodeRef, NAMES),
        st.builds(values.SubgraphRef, NAMES),
        st.builds(values.FunctionRef, NAMES),
        st.builds(values.DTypeRef, DTYPES),
        st.builds(values.LayoutRef, st.just("strided")),
        st.builds(
            values.MemoryFormatRef, st.sampled_from(["contiguous", "preserve", "channels_last", "channels_last_3d"])
        ),
        st.builds(values.RankDevice),
    ),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
NODES = st.builds(
    values.Node,
    NAMES,
    NAMES,
    st.lists(ARGUMENTS, max_size=3).map(tuple),
    st.dictionaries(NAMES, ARGUMENTS, max_size=2),
)


def graphs(depth: int = 1) -> st.SearchStrategy[values.Graph]:
    return st.builds(
        values.Graph,
        inputs=st.lists(NAMES, max_size=3).map(tuple),
        nodes=st.lists(NODES, max_size=3).map(tuple),
        outputs=st.lists(ARGUMENTS, max_size=2).map(tuple),
        subgraphs=st.dictionaries(NAMES, graphs(depth - 1), max_size=1) if depth else st.just({}),
        functions=st.dictionaries(NAMES, functions(depth - 1), max_size=1) if depth else st.just({}),
    )


def functions(depth: int) -> st.SearchStrategy[values.CustomFunction]:
    indices = st.lists(INT64, max_size=2).map(tuple)
    return st.builds(
        values.CustomFunction,
        forward=graphs(depth),
        backward=graphs(depth),
        results=INT64,
        differentiable_results=indices,
        differentiable_inputs=indices,
    )


LEAVES = st.one_of(
    st.builds(values.TensorSpec, DTYPES, st.lists(st.integers(0, 2**40) | NAMES, max_size=3).map(tuple)),
    st.builds(values.ConstantSpec, CONSTANTS),
)
SYMBOLS = st.builds(values.Symbol, NAMES, st.integers(0, 5), st.none() | st.integers(5, 2**63 - 1))
GRAPH_INPUTS = st.one_of(
    st.builds(values.GraphInput, st.just("tensor"), NAMES),
    st.builds(values.GraphInput, st.sampled_from(["input", "output", "target"]), COUNTS),
)


@st.composite
def structures(draw: st.DrawFn) -> tuple[values.Structure, int]:
    """(a structure whose leaves count up from 0, how many they are)."""
    count = 0

    def leaf(_: object) -> values.LeafRef:
        nonlocal count
        count += 1
        return values.LeafRef(count - 1)

    return values.map_leaves(leaf, draw(nested(st.just(True)))), count


@st.composite
def variants(draw: st.DrawFn) -> values.Variant:
    (inputs, input_count), (targets, target_count) = draw(structures()), draw(structures())
    return values.Variant(
        name=draw(NAMES),
        training=draw(st.booleans()),
        graph=draw(graphs()),
        graph_inputs=tuple(draw(st.lists(GRAPH_INPUTS, max_size=3))),
        input_structure=inputs,
        input_leaves=tuple(draw(LEAVES) for _ in range(input_count)),
        output_structure=draw(structures())[0],
        symbols=tuple(draw(st.lists(SYMBOLS, max_size=2))),
        loss_graph=draw(st.none() | graphs(0)),
        loss_graph_inputs=tuple(draw(st.lists(GRAPH_INPUTS, max_size=2))),
        target_structure=targets,
        target_leaves=tuple(draw(LEAVES) for _ in range(target_count)),
        weight_graph=draw(st.none() | graphs(0)),
        weight_graph_inputs=tuple(draw(st.lists(GRAPH_INPUTS, max_size=2))),
    )


def without_graphs(variant: values.Variant) -> values.Variant:
    return replace(variant, graph=None, loss_graph=None, weight_graph=None)


@st.composite
def state_tensors(draw: st.DrawFn, role: str | None = None) -> values.StateTensor:
    role = role or draw(st.sampled_from(["parameter", "buffer", "temporary_buffer", "constant"]))
    dtype = draw(DTYPES)
    can_require = role == "parameter" and "float" in dtype
    return values.StateTensor(
        name=draw(NAMES),
        role=role,
        dtype=dtype,
        shape=draw(SHAPES),
        requires_grad=can_require and draw(st.booleans()),
        alias_of=draw(st.none() | NAMES),
        may_train=can_require and draw(st.booleans()),
    )


def programs(role: str | None = None, most: int = 2) -> st.SearchStrategy[values.Program]:
    return st.builds(
        values.Program,
        torch_version=NAMES,
        tensors=st.lists(state_tensors(role), max_size=3).map(tuple),
        variants=st.lists(variants(), min_size=1, max_size=most).map(tuple),
        operators=st.dictionaries(NAMES, TEXTS, max_size=3),
    )


LOSSES = st.one_of(
    st.builds(values.TorchLossSpec, NAMES, OPTIONS),
    st.builds(values.GraphLossSpec),
    st.builds(values.OutputLossSpec, COUNTS),
)
SCHEDULES = st.recursive(
    st.builds(values.ScheduleSpec, NAMES, OPTIONS),
    lambda parts: st.builds(values.ScheduleSpec, NAMES, OPTIONS, st.lists(parts, max_size=2).map(tuple)),
    max_leaves=4,
)
OPTIMIZERS = st.builds(
    values.OptimizerSpec,
    NAMES,
    OPTIONS,
    st.lists(st.builds(values.ParameterGroupSpec, NAMES, OPTIONS), max_size=2).map(tuple),
    st.none() | SCHEDULES,
)
CLIPS = st.none() | st.floats(1e-300, 1e300)
LABELS = st.dictionaries(NAMES, TEXTS, max_size=1)  # One: a protobuf map has no order of its own.
ROWS = st.lists(COUNTS, max_size=3).map(tuple)
TIMINGS = st.builds(values.Timing, **dict.fromkeys(values.Timing.__dataclass_fields__, FLOATS))
LIMITS = st.builds(
    values.Limits,
    **{name: FLOATS if name.endswith("_seconds") else COUNTS for name in values.Limits.__dataclass_fields__},
)
PRECISIONS = st.sampled_from(["fp32", "bf16", "fp16"])
MODEL_UPDATES = st.builds(
    values.ModelUpdate,
    trainable=st.lists(st.tuples(NAMES, st.booleans()), max_size=3).map(tuple),
    optimizer=st.none() | OPTIMIZERS,
    lr=st.none() | st.floats(0, 10),
    labels=st.none() | LABELS,
).filter(lambda update: update != values.ModelUpdate())
ARCHITECTURES = st.builds(
    values.ArchitectureSpec,
    name=NAMES,
    config=st.dictionaries(NAMES, nested(CONSTANTS), max_size=3),
    weights=st.none() | st.sampled_from(["gpt2", "team/gpt2-1.0_b"]),
)
KEEPING = {
    "durability": st.sampled_from(["", "process", "disk"]),
    "checkpoint_every": st.integers(0, 2**31 - 1),
    "keep_checkpoints": st.integers(0, 2**31 - 1),
    "deterministic": st.booleans(),
}
REDUCTIONS = st.sampled_from([None, "mean", "sum"])
MODEL_SPECS = st.builds(
    values.ModelSpec,
    program=programs() | ARCHITECTURES,
    loss=st.none() | LOSSES,
    optimizer=st.none() | OPTIMIZERS,
    workers=st.integers(1, 2**31 - 1),
    device=st.sampled_from(["auto", "cuda"]),
    gpus_per_worker=st.floats(0.25, 8),
    seed=INT64,
    on_nan=st.sampled_from(["report", "refuse"]),
    require_sharding=st.booleans(),
    labels=LABELS,
    clip_grad_norm=CLIPS,
    clip_grad_value=CLIPS,
    precision=PRECISIONS,
    loss_reduction=REDUCTIONS,
    **KEEPING,
)
MODEL_INFOS = st.builds(
    values.ModelInfo,
    id=NAMES,
    state=st.sampled_from(["creating", "ready", "recovering", "failed", "deleting"]),
    step=COUNTS,
    workers=st.integers(0, 1000),
    sharding=st.none() | st.builds(values.Sharding, st.sampled_from(["rows", "whole"]), TEXTS),
    num_parameters=COUNTS,
    optimizer=st.none() | OPTIMIZERS,
    loss=st.none() | LOSSES,
    labels=LABELS,
    created_at=st.floats(1e9, 4e9),
    last_error=st.none() | TEXTS,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    seed=INT64,
    on_nan=st.sampled_from(["report", "refuse"]),
    tensors=st.lists(state_tensors(), max_size=2).map(tuple),
    variants=st.lists(variants().map(without_graphs), max_size=2).map(tuple),
    rank_rows=ROWS,
    clip_grad_norm=CLIPS,
    clip_grad_value=CLIPS,
    precision=PRECISIONS,
    architecture=st.none() | NAMES,
    loss_reduction=REDUCTIONS,
    **KEEPING,
)
MODEL_IDS = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
CHECKPOINT_IDS = st.from_regex(r"[a-z0-9-]{1,63}", fullmatch=True)
CHECKPOINTS = st.builds(
    values.Checkpoint,
    name=CHECKPOINT_IDS | st.builds(names.automatic_checkpoint, MODEL_IDS, st.integers(0, 10**18 - 1)),
    model_id=MODEL_IDS,
    step=COUNTS,
    command=COUNTS,
    created_at=st.floats(1e9, 4e9),
    nbytes=COUNTS,
    automatic=st.booleans(),
)
STEP_RESULTS = st.builds(
    values.StepResult,
    loss=st.none() | FLOATS,
    step=COUNTS,
    num_examples=COUNTS,
    grad_norm=st.none() | FLOATS,
    lr=st.none() | FLOATS,
    timing=TIMINGS,
    rank_rows=ROWS,
    skipped=st.booleans(),
    loss_scale=st.none() | FLOATS,
)
GRADIENT_RESULTS = st.builds(
    values.GradientResult,
    loss=FLOATS,
    step=COUNTS,
    num_examples=COUNTS,
    gradients=NAMED_TENSORS,
    input_gradients=VALUES,
    outputs=VALUES,
    timing=TIMINGS,
    rank_rows=ROWS,
)
RETAINED = st.text("0123456789abcdef", min_size=32, max_size=32)
WRT = st.none() | st.lists(TEXTS.filter(bool), max_size=3).map(tuple)
FUNCTIONS = st.builds(
    values.FunctionSpec,
    digest=st.just("0123456789abcdef" * 4),
    program=programs("constant", most=1),
    tensors=NAMED_TENSORS,
    output_leaf=COUNTS,
) | st.builds(values.FunctionSpec, digest=st.just("f" * 64), program=st.none(), tensors=st.just({}), output_leaf=COUNTS)
SERVER_INFOS = st.builds(
    values.ServerInfo,
    version=TEXTS,
    torch_version=TEXTS,
    workers=st.integers(0, 1000),
    free_workers=st.integers(0, 1000),
    gpus=FLOATS,
    limits=LIMITS,
)

PAIRS = {
    "checkpoint": CHECKPOINTS,
    "tensor": tensors(),
    "value": VALUES,
    "batch": st.builds(values.Batch, VALUES, VALUES),
    "options": OPTIONS,
    "argument": ARGUMENTS,
    "node": NODES,
    "graph": graphs(2),
    "structure": structures().map(lambda drawn: drawn[0]),
    "leaf": LEAVES,
    "symbol": SYMBOLS,
    "graph_input": GRAPH_INPUTS,
    "state_tensor": state_tensors(),
    "variant": variants(),
    "program": programs(),
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "model_spec": MODEL_SPECS,
    "timing": TIMINGS,
    "step_result": STEP_RESULTS,
    "gradient_result": GRADIENT_RESULTS,
    "forward_result": st.builds(
        values.ForwardResult,
        outputs=VALUES,
        step=COUNTS,
        timing=TIMINGS,
        rank_rows=ROWS,
        retained=st.none() | RETAINED,
        differentiable_outputs=ROWS,
    ),
    "backward_result": st.builds(
        values.BackwardResult,
        input_gradients=st.none() | st.lists(st.none() | tensors(), max_size=3),
        step=COUNTS,
        timing=TIMINGS,
        rank_rows=ROWS,
    ),
    "retention": st.builds(
        values.Retention,
        wrt=WRT,
        inputs=st.lists(COUNTS, max_size=3, unique=True).map(tuple),
        release=st.lists(RETAINED, max_size=3).map(tuple),
    ),
    "derivative_result": st.builds(
        values.DerivativeResult,
        outputs=VALUES,
        derivatives=st.lists(tensors(), max_size=3).map(tuple),
        timing=TIMINGS,
    ),
    "function": FUNCTIONS,
    "command_info": st.builds(
        values.CommandInfo,
        name=TEXTS,
        state=st.sampled_from(["running", "applied", "not_applied"]),
        error=st.none() | TEXTS,
    ),
    "limits": LIMITS,
    "server_info": SERVER_INFOS,
}
SPECIAL = {
    "model_update",
    "model_info",
    "named_tensors",
    "operators",
    "gradient_query",
    "derivative_query",
    "backward_query",
    "cotangents",
    "group_options",
}


def through_the_wire(message: Message) -> Message:
    return type(message).FromString(message.SerializeToString())


def test_every_encoder_and_decoder_is_tested() -> None:
    public = {name.removeprefix("encode_") for name in codec.__all__ if name.startswith("encode_")}
    assert public == set(PAIRS) | SPECIAL


# Values are compared as they print: NaN equals itself there, and -0.0, tuples and bools stay what they are.
@pytest.mark.parametrize("kind", PAIRS)
@EXAMPLES
@given(data=st.data())
def test_value_comes_back_as_it_was(kind: str, data: st.DataObject) -> None:
    value = data.draw(PAIRS[kind])
    message = getattr(codec, f"encode_{kind}")(value)
    assert repr(getattr(codec, f"decode_{kind}")(through_the_wire(message))) == repr(value)


@EXAMPLES
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
