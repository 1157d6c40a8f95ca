from google.protobuf import struct_pb2 as _struct_pb2
from gradwire_proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TensorRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TENSOR_ROLE_UNSPECIFIED: _ClassVar[TensorRole]
    TENSOR_ROLE_PARAMETER: _ClassVar[TensorRole]
    TENSOR_ROLE_BUFFER: _ClassVar[TensorRole]
    TENSOR_ROLE_TEMPORARY_BUFFER: _ClassVar[TensorRole]
    TENSOR_ROLE_CONSTANT: _ClassVar[TensorRole]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_STRIDED: _ClassVar[Layout]

class MemoryFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MEMORY_FORMAT_UNSPECIFIED: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CONTIGUOUS: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_PRESERVE: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CHANNELS_LAST: _ClassVar[MemoryFormat]
    MEMORY_FORMAT_CHANNELS_LAST_3D: _ClassVar[MemoryFormat]
TENSOR_ROLE_UNSPECIFIED: TensorRole
TENSOR_ROLE_PARAMETER: TensorRole
TENSOR_ROLE_BUFFER: TensorRole
TENSOR_ROLE_TEMPORARY_BUFFER: TensorRole
TENSOR_ROLE_CONSTANT: TensorRole
LAYOUT_UNSPECIFIED: Layout
LAYOUT_STRIDED: Layout
MEMORY_FORMAT_UNSPECIFIED: MemoryFormat
MEMORY_FORMAT_CONTIGUOUS: MemoryFormat
MEMORY_FORMAT_PRESERVE: MemoryFormat
MEMORY_FORMAT_CHANNELS_LAST: MemoryFormat
MEMORY_FORMAT_CHANNELS_LAST_3D: MemoryFormat

class Program(_message.Message):
    __slots__ = ("graphs", "architecture")
    GRAPHS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    graphs: GraphProgram
    architecture: Architecture
    def __init__(self, graphs: _Optional[_Union[GraphProgram, _Mapping]] = ..., architecture: _Optional[_Union[Architecture, _Mapping]] = ...) -> None: ...

class Architecture(_message.Message):
    __slots__ = ("name", "config", "weights")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    config: _tensor_pb2.ValueMapping
    weights: str
    def __init__(self, name: _Optional[str] = ..., config: _Optional[_Union[_tensor_pb2.ValueMapping, _Mapping]] = ..., weights: _Optional[str] = ...) -> None: ...

class GraphProgram(_message.Message):
    __slots__ = ("torch_version", "tensors", "variants", "operators")
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    torch_version: str
    tensors: _containers.RepeatedCompositeFieldContainer[StateTensor]
    variants: _containers.RepeatedCompositeFieldContainer[Variant]
    operators: _containers.RepeatedCompositeFieldContainer[OperatorSchema]
    def __init__(self, torch_version: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[StateTensor, _Mapping]]] = ..., variants: _Optional[_Iterable[_Union[Variant, _Mapping]]] = ..., operators: _Optional[_Iterable[_Union[OperatorSchema, _Mapping]]] = ...) -> None: ...

class StateTensor(_message.Message):
    __slots__ = ("name", "role", "dtype", "shape", "requires_grad", "alias_of", "may_train")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    REQUIRES_GRAD_FIELD_NUMBER: _ClassVar[int]
    ALIAS_OF_FIELD_NUMBER: _ClassVar[int]
    MAY_TRAIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: TensorRole
    dtype: _tensor_pb2.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    requires_grad: bool
    alias_of: str
    may_train: bool
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[TensorRole, str]] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., requires_grad: bool = ..., alias_of: _Optional[str] = ..., may_train: bool = ...) -> None: ...

class OperatorSchema(_message.Message):
    __slots__ = ("operator", "schema")
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    operator: str
    schema: str
    def __init__(self, operator: _Optional[str] = ..., schema: _Optional[str] = ...) -> None: ...

class Variant(_message.Message):
    __slots__ = ("name", "training", "graph", "graph_inputs", "input_structure", "input_leaves", "output_structure", "symbols", "loss_graph", "loss_graph_inputs", "target_structure", "target_leaves", "weight_graph", "weight_graph_inputs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    GRAPH_INPUTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    INPUT_LEAVES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    SYMBOLS_FIELD_NUMBER: _ClassVar[int]
    LOSS_GRAPH_FIELD_NUMBER: _ClassVar[int]
    LOSS_GRAPH_INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGET_STRUCTURE_FIELD_NUMBER: _ClassVar[int]
    TARGET_LEAVES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_GRAPH_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_GRAPH_INPUTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    training: bool
    graph: Graph
    graph_inputs: _containers.RepeatedCompositeFieldContainer[GraphInput]
    input_structure: Structure
    input_leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    output_structure: Structure
    symbols: _containers.RepeatedCompositeFieldContainer[Symbol]
    loss_graph: Graph
    loss_graph_inputs: _containers.RepeatedCompositeFieldContainer[GraphInput]
    target_structure: Structure
    target_leaves: _containers.RepeatedCompositeFieldContainer[Leaf]
    weight_graph: Graph
    weight_graph_inputs: _containers.RepeatedCompositeFieldContainer[GraphInput]
    def __init__(self, name: _Optional[str] = ..., training: bool = ..., graph: _Optional[_Union[Graph, _Mapping]] = ..., graph_inputs: _Optional[_Iterable[_Union[GraphInput, _Mapping]]] = ..., input_structure: _Optional[_Union[Structure, _Mapping]] = ..., input_leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ..., output_structure: _Optional[_Union[Structure, _Mapping]] = ..., symbols: _Optional[_Iterable[_Union[Symbol, _Mapping]]] = ..., loss_graph: _Optional[_Union[Graph, _Mapping]] = ..., loss_graph_inputs: _Optional[_Iterable[_Union[GraphInput, _Mapping]]] = ..., target_structure: _Optional[_Union[Structure, _Mapping]] = ..., target_leaves: _Optional[_Iterable[_Union[Leaf, _Mapping]]] = ..., weight_graph: _Optional[_Union[Graph, _Mapping]] = ..., weight_graph_inputs: _Optional[_Iterable[_Union[GraphInput, _Mapping]]] = ...) -> None: ...

class Symbol(_message.Message):
    __slots__ = ("name", "min", "max")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MIN_FIELD_NUMBER: _ClassVar[int]
    MAX_FIELD_NUMBER: _ClassVar[int]
    name: str
    min: int
    max: int
    def __init__(self, name: _Optional[str] = ..., min: _Optional[int] = ..., max: _Optional[int] = ...) -> None: ...

class Dimension(_message.Message):
    __slots__ = ("size", "symbol")
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SYMBOL_FIELD_NUMBER: _ClassVar[int]
    size: int
    symbol: str
    def __init__(self, size: _Optional[int] = ..., symbol: _Optional[str] = ...) -> None: ...

class Leaf(_message.Message):
    __slots__ = ("tensor", "constant")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    tensor: TensorSpec
    constant: _tensor_pb2.Value
    def __init__(self, tensor: _Optional[_Union[TensorSpec, _Mapping]] = ..., constant: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensor_pb2.DType
    shape: _containers.RepeatedCompositeFieldContainer[Dimension]
    def __init__(self, dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., shape: _Optional[_Iterable[_Union[Dimension, _Mapping]]] = ...) -> None: ...

class GraphInput(_message.Message):
    __slots__ = ("tensor", "input_leaf", "output_leaf", "target_leaf")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    INPUT_LEAF_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LEAF_FIELD_NUMBER: _ClassVar[int]
    TARGET_LEAF_FIELD_NUMBER: _ClassVar[int]
    tensor: str
    input_leaf: int
    output_leaf: int
    target_leaf: int
    def __init__(self, tensor: _Optional[str] = ..., input_leaf: _Optional[int] = ..., output_leaf: _Optional[int] = ..., target_leaf: _Optional[int] = ...) -> None: ...

class Structure(_message.Message):
    __slots__ = ("leaf", "tuple", "list", "dict", "none")
    LEAF_FIELD_NUMBER: _ClassVar[int]
    TUPLE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    DICT_FIELD_NUMBER: _ClassVar[int]
    NONE_FIELD_NUMBER: _ClassVar[int]
    leaf: int
    tuple: StructureSequence
    list: StructureSequence
    dict: StructureMapping
    none: _struct_pb2.NullValue
    def __init__(self, leaf: _Optional[int] = ..., tuple: _Optional[_Union[StructureSequence, _Mapping]] = ..., list: _Optional[_Union[StructureSequence, _Mapping]] = ..., dict: _Optional[_Union[StructureMapping, _Mapping]] = ..., none: _Optional[_Union[_struct_pb2.NullValue, str]] = ...) -> None: ...

class StructureSequence(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Structure]
    def __init__(self, items: _Optional[_Iterable[_Union[Structure, _Mapping]]] = ...) -> None: ...

class StructureMapping(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[StructureEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[StructureEntry, _Mapping]]] = ...) -> None: ...

class StructureEntry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: Structure
    def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Structure, _Mapping]] = ...) -> None: ...

class Graph(_message.Message):
    __slots__ = ("inputs", "nodes", "outputs", "subgraphs", "functions")
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SUBGRAPHS_FIELD_NUMBER: _ClassVar[int]
    FUNCTIONS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedScalarFieldContainer[str]
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    outputs: _containers.RepeatedCompositeFieldContainer[Argument]
    subgraphs: _containers.RepeatedCompositeFieldContainer[Subgraph]
    functions: _containers.RepeatedCompositeFieldContainer[CustomFunction]
    def __init__(self, inputs: _Optional[_Iterable[str]] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., outputs: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ..., subgraphs: _Optional[_Iterable[_Union[Subgraph, _Mapping]]] = ..., functions: _Optional[_Iterable[_Union[CustomFunction, _Mapping]]] = ...) -> None: ...

class Subgraph(_message.Message):
    __slots__ = ("name", "graph")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    name: str
    graph: Graph
    def __init__(self, name: _Optional[str] = ..., graph: _Optional[_Union[Graph, _Mapping]] = ...) -> None: ...

class CustomFunction(_message.Message):
    __slots__ = ("name", "forward", "backward", "results", "differentiable_results", "differentiable_inputs")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIABLE_RESULTS_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIABLE_INPUTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    forward: Graph
    backward: Graph
    results: int
    differentiable_results: _containers.RepeatedScalarFieldContainer[int]
    differentiable_inputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., forward: _Optional[_Union[Graph, _Mapping]] = ..., backward: _Optional[_Union[Graph, _Mapping]] = ..., results: _Optional[int] = ..., differentiable_results: _Optional[_Iterable[int]] = ..., differentiable_inputs: _Optional[_Iterable[int]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("name", "operator", "arguments", "keyword_arguments")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPERATOR_FIELD_NUMBER: _ClassVar[int]
    ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    KEYWORD_ARGUMENTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    operator: str
    arguments: _containers.RepeatedCompositeFieldContainer[Argument]
    keyword_arguments: _containers.RepeatedCompositeFieldContainer[NamedArgument]
    def __init__(self, name: _Optional[str] = ..., operator: _Optional[str] = ..., arguments: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ..., keyword_arguments: _Optional[_Iterable[_Union[NamedArgument, _Mapping]]] = ...) -> None: ...

class NamedArgument(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: Argument
    def __init__(self, name: _Optional[str] = ..., value: _Optional[_Union[Argument, _Mapping]] = ...) -> None: ...

class Argument(_message.Message):
    __slots__ = ("none", "node", "integer", "number", "boolean", "text", "complex", "dtype", "layout", "memory_format", "device", "list", "subgraph", "function")
    NONE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    INTEGER_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    BOOLEAN_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    COMPLEX_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FORMAT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    LIST_FIELD_NUMBER: _ClassVar[int]
    SUBGRAPH_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    none: _struct_pb2.NullValue
    node: str
    integer: int
    number: float
    boolean: bool
    text: str
    complex: ComplexNumber
    dtype: _tensor_pb2.DType
    layout: Layout
    memory_format: MemoryFormat
    device: RankDevice
    list: ArgumentSequence
    subgraph: str
    function: str
    def __init__(self, none: _Optional[_Union[_struct_pb2.NullValue, str]] = ..., node: _Optional[str] = ..., integer: _Optional[int] = ..., number: _Optional[float] = ..., boolean: bool = ..., text: _Optional[str] = ..., complex: _Optional[_Union[ComplexNumber, _Mapping]] = ..., dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., layout: _Optional[_Union[Layout, str]] = ..., memory_format: _Optional[_Union[MemoryFormat, str]] = ..., device: _Optional[_Union[RankDevice, _Mapping]] = ..., list: _Optional[_Union[ArgumentSequence, _Mapping]] = ..., subgraph: _Optional[str] = ..., function: _Optional[str] = ...) -> None: ...

class ArgumentSequence(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[Argument]
    def __init__(self, items: _Optional[_Iterable[_Union[Argument, _Mapping]]] = ...) -> None: ...

class ComplexNumber(_message.Message):
    __slots__ = ("real", "imaginary")
    REAL_FIELD_NUMBER: _ClassVar[int]
    IMAGINARY_FIELD_NUMBER: _ClassVar[int]
    real: float
    imaginary: float
    def __init__(self, real: _Optional[float] = ..., imaginary: _Optional[float] = ...) -> None: ...

class RankDevice(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
