from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.api import field_info_pb2 as _field_info_pb2
from google.api import resource_pb2 as _resource_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import empty_pb2 as _empty_pb2
from google.rpc import status_pb2 as _status_pb2
from gradwire_proto.v1 import checkpoint_pb2 as _checkpoint_pb2
from gradwire_proto.v1 import dataset_pb2 as _dataset_pb2
from gradwire_proto.v1 import model_pb2 as _model_pb2
from gradwire_proto.v1 import program_pb2 as _program_pb2
from gradwire_proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Derivative(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DERIVATIVE_UNSPECIFIED: _ClassVar[Derivative]
    DERIVATIVE_NONE: _ClassVar[Derivative]
    DERIVATIVE_VJP: _ClassVar[Derivative]
    DERIVATIVE_JVP: _ClassVar[Derivative]
    DERIVATIVE_JACOBIAN: _ClassVar[Derivative]
    DERIVATIVE_HESSIAN: _ClassVar[Derivative]
    DERIVATIVE_HVP: _ClassVar[Derivative]
DERIVATIVE_UNSPECIFIED: Derivative
DERIVATIVE_NONE: Derivative
DERIVATIVE_VJP: Derivative
DERIVATIVE_JVP: Derivative
DERIVATIVE_JACOBIAN: Derivative
DERIVATIVE_HESSIAN: Derivative
DERIVATIVE_HVP: Derivative

class CreateModelRequest(_message.Message):
    __slots__ = ("model_id", "model", "tensors", "example", "request_id", "wait_for_capacity")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    model: _model_pb2.Model
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    example: _tensor_pb2.Batch
    request_id: str
    wait_for_capacity: _duration_pb2.Duration
    def __init__(self, model_id: _Optional[str] = ..., model: _Optional[_Union[_model_pb2.Model, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., example: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., request_id: _Optional[str] = ..., wait_for_capacity: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "next_page_token")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_model_pb2.Model]
    next_page_token: str
    def __init__(self, models: _Optional[_Iterable[_Union[_model_pb2.Model, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteModelRequest(_message.Message):
    __slots__ = ("name", "request_id", "made_by")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MADE_BY_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    made_by: str
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ..., made_by: _Optional[str] = ...) -> None: ...

class AddVariantRequest(_message.Message):
    __slots__ = ("name", "variant", "tensors", "values", "operators", "example", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VARIANT_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OPERATORS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    variant: _program_pb2.Variant
    tensors: _containers.RepeatedCompositeFieldContainer[_program_pb2.StateTensor]
    values: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    operators: _containers.RepeatedCompositeFieldContainer[_program_pb2.OperatorSchema]
    example: _tensor_pb2.Batch
    request_id: str
    def __init__(self, name: _Optional[str] = ..., variant: _Optional[_Union[_program_pb2.Variant, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_program_pb2.StateTensor, _Mapping]]] = ..., values: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., operators: _Optional[_Iterable[_Union[_program_pb2.OperatorSchema, _Mapping]]] = ..., example: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Function(_message.Message):
    __slots__ = ("digest", "program", "tensors", "output_leaf")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_LEAF_FIELD_NUMBER: _ClassVar[int]
    digest: str
    program: _program_pb2.Program
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    output_leaf: int
    def __init__(self, digest: _Optional[str] = ..., program: _Optional[_Union[_program_pb2.Program, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., output_leaf: _Optional[int] = ...) -> None: ...

class ComputeGradientsRequest(_message.Message):
    __slots__ = ("name", "function", "batch", "wrt", "no_parameter_gradients", "input_gradients", "outputs", "eval_mode", "seed", "gradient_dtype", "max_inline_bytes", "per_example", "vectors", "top_k")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    NO_PARAMETER_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    EVAL_MODE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PER_EXAMPLE_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    name: str
    function: Function
    batch: _tensor_pb2.Batch
    wrt: _containers.RepeatedScalarFieldContainer[str]
    no_parameter_gradients: bool
    input_gradients: bool
    outputs: bool
    eval_mode: bool
    seed: int
    gradient_dtype: _tensor_pb2.DType
    max_inline_bytes: int
    per_example: bool
    vectors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    top_k: float
    def __init__(self, name: _Optional[str] = ..., function: _Optional[_Union[Function, _Mapping]] = ..., batch: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., wrt: _Optional[_Iterable[str]] = ..., no_parameter_gradients: bool = ..., input_gradients: bool = ..., outputs: bool = ..., eval_mode: bool = ..., seed: _Optional[int] = ..., gradient_dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., max_inline_bytes: _Optional[int] = ..., per_example: bool = ..., vectors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., top_k: _Optional[float] = ...) -> None: ...

class SparseTensor(_message.Message):
    __slots__ = ("name", "shape", "indices", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    INDICES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    indices: _tensor_pb2.Tensor
    values: _tensor_pb2.Tensor
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., indices: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., values: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...

class ComputeGradientsResponse(_message.Message):
    __slots__ = ("loss", "step", "num_examples", "gradients", "input_gradients", "outputs", "timing", "rank_rows", "sparse_gradients")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    SPARSE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    loss: float
    step: int
    num_examples: int
    gradients: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    input_gradients: _tensor_pb2.Value
    outputs: _tensor_pb2.Value
    timing: _model_pb2.Timing
    rank_rows: _containers.RepeatedScalarFieldContainer[int]
    sparse_gradients: _containers.RepeatedCompositeFieldContainer[SparseTensor]
    def __init__(self, loss: _Optional[float] = ..., step: _Optional[int] = ..., num_examples: _Optional[int] = ..., gradients: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., input_gradients: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., outputs: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ..., rank_rows: _Optional[_Iterable[int]] = ..., sparse_gradients: _Optional[_Iterable[_Union[SparseTensor, _Mapping]]] = ...) -> None: ...

class DifferentiateFunctionRequest(_message.Message):
    __slots__ = ("function", "batch", "derivative", "wrt", "differentiated_outputs", "vectors", "chunk_size", "strict", "seed", "max_inline_bytes")
    FUNCTION_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    DERIVATIVE_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIATED_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_SIZE_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    function: Function
    batch: _tensor_pb2.Batch
    derivative: Derivative
    wrt: _containers.RepeatedScalarFieldContainer[int]
    differentiated_outputs: int
    vectors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    chunk_size: int
    strict: bool
    seed: int
    max_inline_bytes: int
    def __init__(self, function: _Optional[_Union[Function, _Mapping]] = ..., batch: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., derivative: _Optional[_Union[Derivative, str]] = ..., wrt: _Optional[_Iterable[int]] = ..., differentiated_outputs: _Optional[int] = ..., vectors: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., chunk_size: _Optional[int] = ..., strict: bool = ..., seed: _Optional[int] = ..., max_inline_bytes: _Optional[int] = ...) -> None: ...

class DifferentiateFunctionResponse(_message.Message):
    __slots__ = ("outputs", "derivatives", "timing")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    DERIVATIVES_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    outputs: _tensor_pb2.Value
    derivatives: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.Tensor]
    timing: _model_pb2.Timing
    def __init__(self, outputs: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., derivatives: _Optional[_Iterable[_Union[_tensor_pb2.Tensor, _Mapping]]] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("name", "batch", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    batch: _tensor_pb2.Batch
    request_id: str
    def __init__(self, name: _Optional[str] = ..., batch: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class ForwardBackwardResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _model_pb2.StepResult
    def __init__(self, result: _Optional[_Union[_model_pb2.StepResult, _Mapping]] = ...) -> None: ...

class OptimizerStepRequest(_message.Message):
    __slots__ = ("name", "gradients", "learning_rate", "request_id", "groups")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    name: str
    gradients: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    learning_rate: float
    request_id: str
    groups: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.ValueMapping]
    def __init__(self, name: _Optional[str] = ..., gradients: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., learning_rate: _Optional[float] = ..., request_id: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[_tensor_pb2.ValueMapping, _Mapping]]] = ...) -> None: ...

class OptimizerStepResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _model_pb2.StepResult
    def __init__(self, result: _Optional[_Union[_model_pb2.StepResult, _Mapping]] = ...) -> None: ...

class TrainStepRequest(_message.Message):
    __slots__ = ("name", "batch", "learning_rate", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    batch: _tensor_pb2.Batch
    learning_rate: float
    request_id: str
    def __init__(self, name: _Optional[str] = ..., batch: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., learning_rate: _Optional[float] = ..., request_id: _Optional[str] = ...) -> None: ...

class TrainStepResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _model_pb2.StepResult
    def __init__(self, result: _Optional[_Union[_model_pb2.StepResult, _Mapping]] = ...) -> None: ...

class TrainStepsRequest(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[TrainStepRequest]
    def __init__(self, steps: _Optional[_Iterable[_Union[TrainStepRequest, _Mapping]]] = ...) -> None: ...

class TrainStepsResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[TrainStepsOutcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[TrainStepsOutcome, _Mapping]]] = ...) -> None: ...

class TrainStepsOutcome(_message.Message):
    __slots__ = ("result", "error")
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    result: _model_pb2.StepResult
    error: _status_pb2.Status
    def __init__(self, result: _Optional[_Union[_model_pb2.StepResult, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class ZeroGradRequest(_message.Message):
    __slots__ = ("name", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class ZeroGradResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ForwardRequest(_message.Message):
    __slots__ = ("name", "inputs", "training", "seed", "max_inline_bytes", "request_id", "retain")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TRAINING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    RETAIN_FIELD_NUMBER: _ClassVar[int]
    name: str
    inputs: _tensor_pb2.Value
    training: bool
    seed: int
    max_inline_bytes: int
    request_id: str
    retain: Retention
    def __init__(self, name: _Optional[str] = ..., inputs: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., training: bool = ..., seed: _Optional[int] = ..., max_inline_bytes: _Optional[int] = ..., request_id: _Optional[str] = ..., retain: _Optional[_Union[Retention, _Mapping]] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("wrt", "no_parameter_gradients", "inputs", "release")
    WRT_FIELD_NUMBER: _ClassVar[int]
    NO_PARAMETER_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    wrt: _containers.RepeatedScalarFieldContainer[str]
    no_parameter_gradients: bool
    inputs: _containers.RepeatedScalarFieldContainer[int]
    release: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, wrt: _Optional[_Iterable[str]] = ..., no_parameter_gradients: bool = ..., inputs: _Optional[_Iterable[int]] = ..., release: _Optional[_Iterable[str]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("outputs", "step", "timing", "rank_rows", "retained", "differentiable_outputs")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    DIFFERENTIABLE_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _tensor_pb2.Value
    step: int
    timing: _model_pb2.Timing
    rank_rows: _containers.RepeatedScalarFieldContainer[int]
    retained: str
    differentiable_outputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., step: _Optional[int] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ..., rank_rows: _Optional[_Iterable[int]] = ..., retained: _Optional[str] = ..., differentiable_outputs: _Optional[_Iterable[int]] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("name", "retained", "cotangents", "wrt", "no_parameter_gradients", "input_gradients", "keep", "max_inline_bytes", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    COTANGENTS_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    NO_PARAMETER_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    retained: str
    cotangents: _tensor_pb2.Value
    wrt: _containers.RepeatedScalarFieldContainer[str]
    no_parameter_gradients: bool
    input_gradients: bool
    keep: bool
    max_inline_bytes: int
    request_id: str
    def __init__(self, name: _Optional[str] = ..., retained: _Optional[str] = ..., cotangents: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., wrt: _Optional[_Iterable[str]] = ..., no_parameter_gradients: bool = ..., input_gradients: bool = ..., keep: bool = ..., max_inline_bytes: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class BackwardResponse(_message.Message):
    __slots__ = ("input_gradients", "step", "timing", "rank_rows")
    INPUT_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    input_gradients: _tensor_pb2.Value
    step: int
    timing: _model_pb2.Timing
    rank_rows: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, input_gradients: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., step: _Optional[int] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ..., rank_rows: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("name", "retained")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FIELD_NUMBER: _ClassVar[int]
    name: str
    retained: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, name: _Optional[str] = ..., retained: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetGradientsRequest(_message.Message):
    __slots__ = ("name", "wrt", "max_inline_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WRT_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    wrt: _containers.RepeatedScalarFieldContainer[str]
    max_inline_bytes: int
    def __init__(self, name: _Optional[str] = ..., wrt: _Optional[_Iterable[str]] = ..., max_inline_bytes: _Optional[int] = ...) -> None: ...

class GetGradientsResponse(_message.Message):
    __slots__ = ("gradients", "step")
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    gradients: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    step: int
    def __init__(self, gradients: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class SetGradientsRequest(_message.Message):
    __slots__ = ("name", "gradients", "dropped", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    gradients: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    dropped: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    def __init__(self, name: _Optional[str] = ..., gradients: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., dropped: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ...) -> None: ...

class SetGradientsResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class GetStateDictRequest(_message.Message):
    __slots__ = ("name", "names", "max_inline_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    names: _containers.RepeatedScalarFieldContainer[str]
    max_inline_bytes: int
    def __init__(self, name: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., max_inline_bytes: _Optional[int] = ...) -> None: ...

class GetStateDictResponse(_message.Message):
    __slots__ = ("tensors", "step")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    step: int
    def __init__(self, tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class LoadStateDictRequest(_message.Message):
    __slots__ = ("name", "tensors", "partial", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    tensors: _containers.RepeatedCompositeFieldContainer[_tensor_pb2.NamedTensor]
    partial: bool
    request_id: str
    def __init__(self, name: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[_tensor_pb2.NamedTensor, _Mapping]]] = ..., partial: bool = ..., request_id: _Optional[str] = ...) -> None: ...

class LoadStateDictResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class UpdateModelRequest(_message.Message):
    __slots__ = ("name", "trainable", "optimizer", "learning_rate", "labels", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    trainable: _containers.RepeatedCompositeFieldContainer[Trainable]
    optimizer: _model_pb2.Optimizer
    learning_rate: float
    labels: Labels
    request_id: str
    def __init__(self, name: _Optional[str] = ..., trainable: _Optional[_Iterable[_Union[Trainable, _Mapping]]] = ..., optimizer: _Optional[_Union[_model_pb2.Optimizer, _Mapping]] = ..., learning_rate: _Optional[float] = ..., labels: _Optional[_Union[Labels, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class Trainable(_message.Message):
    __slots__ = ("pattern", "trainable")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    TRAINABLE_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    trainable: bool
    def __init__(self, pattern: _Optional[str] = ..., trainable: bool = ...) -> None: ...

class Labels(_message.Message):
    __slots__ = ("labels",)
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    LABELS_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.ScalarMap[str, str]
    def __init__(self, labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class GetOptimizerStateRequest(_message.Message):
    __slots__ = ("name", "max_inline_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_inline_bytes: int
    def __init__(self, name: _Optional[str] = ..., max_inline_bytes: _Optional[int] = ...) -> None: ...

class GetOptimizerStateResponse(_message.Message):
    __slots__ = ("state", "step")
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    state: _tensor_pb2.Value
    step: int
    def __init__(self, state: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...

class LoadOptimizerStateRequest(_message.Message):
    __slots__ = ("name", "state", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: _tensor_pb2.Value
    request_id: str
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., request_id: _Optional[str] = ...) -> None: ...

class LoadOptimizerStateResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class GetCommandRequest(_message.Message):
    __slots__ = ("name", "wait")
    NAME_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    name: str
    wait: bool
    def __init__(self, name: _Optional[str] = ..., wait: bool = ...) -> None: ...

class CreateCheckpointRequest(_message.Message):
    __slots__ = ("parent", "checkpoint_id", "request_id")
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    parent: str
    checkpoint_id: str
    request_id: str
    def __init__(self, parent: _Optional[str] = ..., checkpoint_id: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class GetCheckpointRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints", "next_page_token")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[_checkpoint_pb2.Checkpoint]
    next_page_token: str
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[_checkpoint_pb2.Checkpoint, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteCheckpointRequest(_message.Message):
    __slots__ = ("name", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class RestoreModelRequest(_message.Message):
    __slots__ = ("checkpoint", "model_id", "workers", "request_id", "wait_for_capacity")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_CAPACITY_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    model_id: str
    workers: int
    request_id: str
    wait_for_capacity: _duration_pb2.Duration
    def __init__(self, checkpoint: _Optional[str] = ..., model_id: _Optional[str] = ..., workers: _Optional[int] = ..., request_id: _Optional[str] = ..., wait_for_capacity: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("dtype", "shape")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    dtype: _tensor_pb2.DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, dtype: _Optional[_Union[_tensor_pb2.DType, str]] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class UploadManifest(_message.Message):
    __slots__ = ("tensors", "upload_id")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[UploadHeader]
    upload_id: str
    def __init__(self, tensors: _Optional[_Iterable[_Union[UploadHeader, _Mapping]]] = ..., upload_id: _Optional[str] = ...) -> None: ...

class UploadTensorsRequest(_message.Message):
    __slots__ = ("manifest", "chunk")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    manifest: UploadManifest
    chunk: bytes
    def __init__(self, manifest: _Optional[_Union[UploadManifest, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadTensorsResponse(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DownloadTensorsRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class DownloadTensorsResponse(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "torch_version", "workers", "free_workers", "gpus", "limits", "local_socket")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TORCH_VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    FREE_WORKERS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    version: str
    torch_version: str
    workers: int
    free_workers: int
    gpus: float
    limits: Limits
    local_socket: str
    def __init__(self, version: _Optional[str] = ..., torch_version: _Optional[str] = ..., workers: _Optional[int] = ..., free_workers: _Optional[int] = ..., gpus: _Optional[float] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., local_socket: _Optional[str] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("message_bytes", "tensor_bytes", "graph_nodes", "model_bytes", "models", "requests_in_flight", "requests_per_model", "held_bytes", "variants", "held_seconds", "retained_bytes", "retained_forwards", "retained_seconds")
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    GRAPH_NODES_FIELD_NUMBER: _ClassVar[int]
    MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PER_MODEL_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    HELD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RETAINED_FORWARDS_FIELD_NUMBER: _ClassVar[int]
    RETAINED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    message_bytes: int
    tensor_bytes: int
    graph_nodes: int
    model_bytes: int
    models: int
    requests_in_flight: int
    requests_per_model: int
    held_bytes: int
    variants: int
    held_seconds: float
    retained_bytes: int
    retained_forwards: int
    retained_seconds: float
    def __init__(self, message_bytes: _Optional[int] = ..., tensor_bytes: _Optional[int] = ..., graph_nodes: _Optional[int] = ..., model_bytes: _Optional[int] = ..., models: _Optional[int] = ..., requests_in_flight: _Optional[int] = ..., requests_per_model: _Optional[int] = ..., held_bytes: _Optional[int] = ..., variants: _Optional[int] = ..., held_seconds: _Optional[float] = ..., retained_bytes: _Optional[int] = ..., retained_forwards: _Optional[int] = ..., retained_seconds: _Optional[float] = ...) -> None: ...
