"""Programs, their variants and tensors to messages and back. Their consistency is for graph_check."""

from __future__ import annotations

from collections.abc import Iterable

from gradwire_proto.encoding.architecture_codec import decode_architecture, encode_architecture
from gradwire_proto.encoding.enum_words import DTYPES, TENSOR_ROLES
from gradwire_proto.encoding.graph_codec import decode_graph, decode_operators, encode_graph, encode_operators
from gradwire_proto.encoding.scalar_codec import check_integer, check_name, check_text, missing
from gradwire_proto.encoding.structure_codec import (
    decode_leaf,
    decode_structure,
    decode_symbol,
    encode_leaf,
    encode_structure,
    encode_symbol,
)
from gradwire_proto.encoding.tensor_codec import decode_tensor_type
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import program_pb2 as pb
from gradwire_proto.values import (
    ArchitectureSpec,
    GraphInput,
    Leaf,
    Limits,
    Program,
    StateTensor,
    Structure,
    Variant,
    leaves,
)

_SOURCE_OF_KIND = {"tensor": "tensor", "input": "input_leaf", "output": "output_leaf", "target": "target_leaf"}
_KIND_OF_SOURCE = {source: kind for kind, source in _SOURCE_OF_KIND.items()}


def encode_graph_input(value: GraphInput, into: pb.GraphInput | None = None) -> pb.GraphInput:
    """The message of what an input of a graph is bound to."""
    message = pb.GraphInput() if into is None else into
    setattr(message, _SOURCE_OF_KIND[value.kind], value.key)
    return message


def decode_graph_input(message: pb.GraphInput, field: str = "graph_input") -> GraphInput:
    """What an input of a graph is bound to."""
    source = message.WhichOneof("source")
    if source is None:
        raise missing(field, "a source")
    key = getattr(message, source)
    if source == "tensor":
        check_name(key, f"{field}.tensor")
    else:
        check_integer(key, f"{field}.{source}", minimum=0)
    return GraphInput(_KIND_OF_SOURCE[source], key)


def encode_state_tensor(value: StateTensor, into: pb.StateTensor | None = None) -> pb.StateTensor:
    """The message of a tensor of a program: its description, not its elements."""
    message = pb.StateTensor() if into is None else into
    message.name = check_text(value.name, "name")
    message.role = TENSOR_ROLES.number(value.role, "role")  # pyright: ignore[reportAttributeAccessIssue]
    message.dtype = DTYPES.number(value.dtype, "dtype")  # pyright: ignore[reportAttributeAccessIssue]
    message.shape.extend(value.shape)
    message.requires_grad = value.requires_grad
    message.alias_of = value.alias_of or ""
    message.may_train = value.may_train
    return message


def decode_state_tensor(message: pb.StateTensor, field: str = "tensor", limits: Limits | None = None) -> StateTensor:
    """The description of a tensor of a program. Only parameters of floating-point or complex type require gradients."""
    dtype, shape = decode_tensor_type(message.dtype, message.shape, field, limits)
    role = TENSOR_ROLES.word(message.role, f"{field}.role")
    differentiable = role == "parameter" and dtype.startswith(("float", "bfloat", "complex"))
    for name in ("requires_grad", "may_train"):
        if getattr(message, name) and not differentiable:
            raise InvalidArgument(
                f"only parameters of floating-point or complex type require gradients, not a {role} of {dtype}",
                field=f"{field}.{name}",
                reason="GRADIENT_NOT_POSSIBLE",
            )
    return StateTensor(
        name=check_name(message.name, f"{field}.name"),
        role=role,
        dtype=dtype,
        shape=shape,
        requires_grad=message.requires_grad,
        alias_of=message.alias_of or None,
        may_train=message.may_train,
    )


def decode_state_tensors(
    messages: Iterable[pb.StateTensor], field: str = "tensors", limits: Limits | None = None
) -> tuple[StateTensor, ...]:
    """The descriptions of tensors, in order."""
    return tuple(decode_state_tensor(item, f"{field}[{index}]", limits) for index, item in enumerate(messages))


def encode_variant(value: Variant, into: pb.Variant | None = None, field: str = "variant") -> pb.Variant:
    """The message of a variant. A graph of None is left out."""
    message = pb.Variant() if into is None else into
    message.name = value.name
    message.training = value.training
    if value.graph is not None:
        encode_graph(value.graph, message.graph, f"{field}.graph")
    if value.loss_graph is not None:
        encode_graph(value.loss_graph, message.loss_graph, f"{field}.loss_graph")
    if value.weight_graph is not None:
        encode_graph(value.weight_graph, message.weight_graph, f"{field}.weight_graph")
    for item in value.graph_inputs:
        encode_graph_input(item, message.graph_inputs.add())
    for item in value.loss_graph_inputs:
        encode_graph_input(item, message.loss_graph_inputs.add())
    for item in value.weight_graph_inputs:
        encode_graph_input(item, message.weight_graph_inputs.add())
    encode_structure(value.input_structure, message.input_structure, f"{field}.input_structure")
    encode_structure(value.output_structure, message.output_structure, f"{field}.output_structure")
    encode_structure(value.target_structure, message.target_structure, f"{field}.target_structure")
    for index, leaf in enumerate(value.input_leaves):
        encode_leaf(leaf, message.input_leaves.add(), f"{field}.input_leaves[{index}]")
    for index, leaf in enumerate(value.target_leaves):
        encode_leaf(leaf, message.target_leaves.add(), f"{field}.target_leaves[{index}]")
    for index, symbol in enumerate(value.symbols):
        encode_symbol(symbol, message.symbols.add(), f"{field}.symbols[{index}]")
    return message


def decode_variant(message: pb.Variant, field: str = "variant", *, require_graph: bool = True) -> Variant:
    """The variant of a message. `require_graph=False` takes a description without graphs, as ModelInfo has them."""
    if require_graph and not message.HasField("graph"):
        raise missing(f"{field}.graph", "a graph")
    input_structure = decode_structure(message.input_structure, f"{field}.input_structure")
    _check_leaf_count(input_structure, len(message.input_leaves), f"{field}.input_structure")
    target_structure = None
    if message.HasField("target_structure"):
        target_structure = decode_structure(message.target_structure, f"{field}.target_structure")
    _check_leaf_count(target_structure, len(message.target_leaves), f"{field}.target_structure")
    return Variant(
        name=check_name(message.name, f"{field}.name"),
        training=message.training,
        graph=decode_graph(message.graph, f"{field}.graph") if message.HasField("graph") else None,
        graph_inputs=_decode_graph_inputs(message.graph_inputs, f"{field}.graph_inputs"),
        input_structure=input_structure,
        input_leaves=_decode_leaves(message.input_leaves, f"{field}.input_leaves"),
        output_structure=decode_structure(message.output_structure, f"{field}.output_structure"),
        symbols=tuple(decode_symbol(item, f"{field}.symbols[{i}]") for i, item in enumerate(message.symbols)),
        loss_graph=decode_graph(message.loss_graph, f"{field}.loss_graph") if message.HasField("loss_graph") else None,
        loss_graph_inputs=_decode_graph_inputs(message.loss_graph_inputs, f"{field}.loss_graph_inputs"),
        target_structure=target_structure,
        target_leaves=_decode_leaves(message.target_leaves, f"{field}.target_leaves"),
        weight_graph=(
            decode_graph(message.weight_graph, f"{field}.weight_graph") if message.HasField("weight_graph") else None
        ),
        weight_graph_inputs=_decode_graph_inputs(message.weight_graph_inputs, f"{field}.weight_graph_inputs"),
    )


def _check_leaf_count(structure: Structure, count: int, field: str) -> None:
    found = sorted(leaf.index for _, leaf in leaves(structure))
    if found != list(range(count)):
        raise InvalidArgument(
            f"expected each of {count} leaves once, got {len(found)}: {found[:20]}",
            field=field,
            reason="STRUCTURE_INVALID",
        )


def _decode_graph_inputs(messages: Iterable[pb.GraphInput], field: str) -> tuple[GraphInput, ...]:
    return tuple(decode_graph_input(item, f"{field}[{index}]") for index, item in enumerate(messages))


def _decode_leaves(messages: Iterable[pb.Leaf], field: str) -> tuple[Leaf, ...]:
    return tuple(decode_leaf(item, f"{field}[{index}]") for index, item in enumerate(messages))


def encode_program(
    value: Program | ArchitectureSpec, into: pb.Program | None = None, field: str = "program"
) -> pb.Program:
    """The message of a program, of graphs or an architecture."""
    message = pb.Program() if into is None else into
    if isinstance(value, ArchitectureSpec):
        encode_architecture(value, message.architecture, f"{field}.architecture")
        return message
    graphs = message.graphs
    graphs.torch_version = value.torch_version
    for tensor in value.tensors:
        encode_state_tensor(tensor, graphs.tensors.add())
    for index, variant in enumerate(value.variants):
        encode_variant(variant, graphs.variants.add(), f"{field}.graphs.variants[{index}]")
    encode_operators(value.operators, graphs.operators)
    return message


def decode_program(
    message: pb.Program, field: str = "program", limits: Limits | None = None
) -> Program | ArchitectureSpec:
    """The program of a message. Graphs are checked with graph_check before use, an architecture when it is built."""
    kind = message.WhichOneof("kind")
    if kind is None:
        raise missing(f"{field}.graphs", "a program")
    if kind == "architecture":
        return decode_architecture(message.architecture, f"{field}.architecture")
    return decode_graphs(message, field, limits)


def decode_graphs(message: pb.Program, field: str = "program", limits: Limits | None = None) -> Program:
    """The program of a message that must be one of graphs: at least one variant, each with its graph."""
    if message.WhichOneof("kind") != "graphs":
        raise missing(f"{field}.graphs", "graphs")
    graphs, path = message.graphs, f"{field}.graphs"
    if not graphs.variants:
        raise missing(f"{path}.variants", "at least one variant")
    return Program(
        torch_version=check_name(graphs.torch_version, f"{path}.torch_version"),
        tensors=decode_state_tensors(graphs.tensors, f"{path}.tensors", limits),
        variants=tuple(decode_variant(item, f"{path}.variants[{index}]") for index, item in enumerate(graphs.variants)),
        operators=decode_operators(graphs.operators, f"{path}.operators"),
    )
