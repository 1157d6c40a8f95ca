"""Tensors, nested values, graphs and programs that hypothesis makes up."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from gradwire_proto import values

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
