from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class KernelsState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KERNELS_STATE_UNSPECIFIED: _ClassVar[KernelsState]
    KERNELS_STATE_COMPILING: _ClassVar[KernelsState]
    KERNELS_STATE_IN_USE: _ClassVar[KernelsState]
    KERNELS_STATE_REFUSED: _ClassVar[KernelsState]
KERNELS_STATE_UNSPECIFIED: KernelsState
KERNELS_STATE_COMPILING: KernelsState
KERNELS_STATE_IN_USE: KernelsState
KERNELS_STATE_REFUSED: KernelsState

class LeafShape(_message.Message):
    __slots__ = ("is_tensor", "sizes")
    IS_TENSOR_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    is_tensor: bool
    sizes: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, is_tensor: bool = ..., sizes: _Optional[_Iterable[int]] = ...) -> None: ...

class BatchShapes(_message.Message):
    __slots__ = ("variant", "inputs", "targets")
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    variant: str
    inputs: _containers.RepeatedCompositeFieldContainer[LeafShape]
    targets: _containers.RepeatedCompositeFieldContainer[LeafShape]
    def __init__(self, variant: _Optional[str] = ..., inputs: _Optional[_Iterable[_Union[LeafShape, _Mapping]]] = ..., targets: _Optional[_Iterable[_Union[LeafShape, _Mapping]]] = ...) -> None: ...

class CompiledKernels(_message.Message):
    __slots__ = ("batches", "state", "reason")
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    batches: BatchShapes
    state: KernelsState
    reason: str
    def __init__(self, batches: _Optional[_Union[BatchShapes, _Mapping]] = ..., state: _Optional[_Union[KernelsState, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class SwapKernelsRequest(_message.Message):
    __slots__ = ("name", "batches")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    name: str
    batches: BatchShapes
    def __init__(self, name: _Optional[str] = ..., batches: _Optional[_Union[BatchShapes, _Mapping]] = ...) -> None: ...

class SwapKernelsResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
