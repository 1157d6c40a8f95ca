from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.api import resource_pb2 as _resource_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from gradwire_proto.v1 import kernels_pb2 as _kernels_pb2
from gradwire_proto.v1 import program_pb2 as _program_pb2
from gradwire_proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LossReduction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LOSS_REDUCTION_UNSPECIFIED: _ClassVar[LossReduction]
    LOSS_REDUCTION_MEAN: _ClassVar[LossReduction]
    LOSS_REDUCTION_SUM: _ClassVar[LossReduction]

class ModelState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_STATE_UNSPECIFIED: _ClassVar[ModelState]
    MODEL_STATE_CREATING: _ClassVar[ModelState]
    MODEL_STATE_READY: _ClassVar[ModelState]
    MODEL_STATE_FAILED: _ClassVar[ModelState]
    MODEL_STATE_DELETING: _ClassVar[ModelState]
    MODEL_STATE_RECOVERING: _ClassVar[ModelState]
    MODEL_STATE_WAITING: _ClassVar[ModelState]

class ShardingMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHARDING_MODE_UNSPECIFIED: _ClassVar[ShardingMode]
    SHARDING_MODE_ROWS: _ClassVar[ShardingMode]
    SHARDING_MODE_WHOLE: _ClassVar[ShardingMode]

class OnNan(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ON_NAN_UNSPECIFIED: _ClassVar[OnNan]
    ON_NAN_REPORT: _ClassVar[OnNan]
    ON_NAN_REFUSE: _ClassVar[OnNan]

class Durability(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DURABILITY_UNSPECIFIED: _ClassVar[Durability]
    DURABILITY_NONE: _ClassVar[Durability]
    DURABILITY_PROCESS: _ClassVar[Durability]
    DURABILITY_DISK: _ClassVar[Durability]

class Precision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRECISION_UNSPECIFIED: _ClassVar[Precision]
    PRECISION_FP32: _ClassVar[Precision]
    PRECISION_BF16: _ClassVar[Precision]
    PRECISION_FP16: _ClassVar[Precision]

class Device(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE_UNSPECIFIED: _ClassVar[Device]
    DEVICE_CPU: _ClassVar[Device]
    DEVICE_CUDA: _ClassVar[Device]

class CommandState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMMAND_STATE_UNSPECIFIED: _ClassVar[CommandState]
    COMMAND_STATE_RUNNING: _ClassVar[CommandState]
    COMMAND_STATE_APPLIED: _ClassVar[CommandState]
    COMMAND_STATE_NOT_APPLIED: _ClassVar[CommandState]
LOSS_REDUCTION_UNSPECIFIED: LossReduction
LOSS_REDUCTION_MEAN: LossReduction
LOSS_REDUCTION_SUM: LossReduction
MODEL_STATE_UNSPECIFIED: ModelState
MODEL_STATE_CREATING: ModelState
MODEL_STATE_READY: ModelState
MODEL_STATE_FAILED: ModelState
MODEL_STATE_DELETING: ModelState
MODEL_STATE_RECOVERING: ModelState
MODEL_STATE_WAITING: ModelState
SHARDING_MODE_UNSPECIFIED: ShardingMode
SHARDING_MODE_ROWS: ShardingMode
SHARDING_MODE_WHOLE: ShardingMode
ON_NAN_UNSPECIFIED: OnNan
ON_NAN_REPORT: OnNan
ON_NAN_REFUSE: OnNan
DURABILITY_UNSPECIFIED: Durability
DURABILITY_NONE: Durability
DURABILITY_PROCESS: Durability
DURABILITY_DISK: Durability
PRECISION_UNSPECIFIED: Precision
PRECISION_FP32: Precision
PRECISION_BF16: Precision
PRECISION_FP16: Precision
DEVICE_UNSPECIFIED: Device
DEVICE_CPU: Device
DEVICE_CUDA: Device
COMMAND_STATE_UNSPECIFIED: CommandState
COMMAND_STATE_RUNNING: CommandState
COMMAND_STATE_APPLIED: CommandState
COMMAND_STATE_NOT_APPLIED: CommandState

class Optimizer(_message.Message):
    __slots__ = ("name", "options", "groups", "schedule")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: _tensor_pb2.ValueMapping
    groups: _containers.RepeatedCompositeFieldContainer[ParameterGroup]
    schedule: Schedule
    def __init__(self, name: _Optional[str] = ..., options: _Optional[_Union[_tensor_pb2.ValueMapping, _Mapping]] = ..., groups: _Optional[_Iterable[_Union[ParameterGroup, _Mapping]]] = ..., schedule: _Optional[_Union[Schedule, _Mapping]] = ...) -> None: ...

class ParameterGroup(_message.Message):
    __slots__ = ("pattern", "options")
    PATTERN_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    pattern: str
    options: _tensor_pb2.ValueMapping
    def __init__(self, pattern: _Optional[str] = ..., options: _Optional[_Union[_tensor_pb2.ValueMapping, _Mapping]] = ...) -> None: ...

class Schedule(_message.Message):
    __slots__ = ("name", "options", "schedulers")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: _tensor_pb2.ValueMapping
    schedulers: _containers.RepeatedCompositeFieldContainer[Schedule]
    def __init__(self, name: _Optional[str] = ..., options: _Optional[_Union[_tensor_pb2.ValueMapping, _Mapping]] = ..., schedulers: _Optional[_Iterable[_Union[Schedule, _Mapping]]] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("torch", "graph", "output")
    TORCH_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    torch: TorchLoss
    graph: GraphLoss
    output: OutputLoss
    def __init__(self, torch: _Optional[_Union[TorchLoss, _Mapping]] = ..., graph: _Optional[_Union[GraphLoss, _Mapping]] = ..., output: _Optional[_Union[OutputLoss, _Mapping]] = ...) -> None: ...

class TorchLoss(_message.Message):
    __slots__ = ("name", "options")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: _tensor_pb2.ValueMapping
    def __init__(self, name: _Optional[str] = ..., options: _Optional[_Union[_tensor_pb2.ValueMapping, _Mapping]] = ...) -> None: ...

class GraphLoss(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class OutputLoss(_message.Message):
    __slots__ = ("output_leaf",)
    OUTPUT_LEAF_FIELD_NUMBER: _ClassVar[int]
    output_leaf: int
    def __init__(self, output_leaf: _Optional[int] = ...) -> None: ...

class Sharding(_message.Message):
    __slots__ = ("mode", "reason")
    MODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    mode: ShardingMode
    reason: str
    def __init__(self, mode: _Optional[_Union[ShardingMode, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "program", "loss", "optimizer", "workers", "device", "gpus_per_worker", "seed", "on_nan", "require_sharding", "labels", "durability", "checkpoint_every", "keep_checkpoints", "clip_grad_norm", "clip_grad_value", "precision", "deterministic", "loss_reduction", "state", "step", "sharding", "parameter_count", "create_time", "last_error", "tensors", "variants", "rank_rows", "architecture", "sync_batch_norm", "compile", "compiled", "waits_for")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    GPUS_PER_WORKER_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ON_NAN_FIELD_NUMBER: _ClassVar[int]
    REQUIRE_SHARDING_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    KEEP_CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    CLIP_GRAD_VALUE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    LOSS_REDUCTION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SHARDING_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_COUNT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    VARIANTS_FIELD_NUMBER: _ClassVar[int]
    RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    SYNC_BATCH_NORM_FIELD_NUMBER: _ClassVar[int]
    COMPILE_FIELD_NUMBER: _ClassVar[int]
    COMPILED_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    name: str
    program: _program_pb2.Program
    loss: Loss
    optimizer: Optimizer
    workers: int
    device: Device
    gpus_per_worker: float
    seed: int
    on_nan: OnNan
    require_sharding: bool
    labels: _containers.ScalarMap[str, str]
    durability: Durability
    checkpoint_every: int
    keep_checkpoints: int
    clip_grad_norm: float
    clip_grad_value: float
    precision: Precision
    deterministic: bool
    loss_reduction: LossReduction
    state: ModelState
    step: int
    sharding: Sharding
    parameter_count: int
    create_time: _timestamp_pb2.Timestamp
    last_error: _status_pb2.Status
    tensors: _containers.RepeatedCompositeFieldContainer[_program_pb2.StateTensor]
    variants: _containers.RepeatedCompositeFieldContainer[_program_pb2.Variant]
    rank_rows: _containers.RepeatedScalarFieldContainer[int]
    architecture: str
    sync_batch_norm: bool
    compile: bool
    compiled: _containers.RepeatedCompositeFieldContainer[_kernels_pb2.CompiledKernels]
    waits_for: str
    def __init__(self, name: _Optional[str] = ..., program: _Optional[_Union[_program_pb2.Program, _Mapping]] = ..., loss: _Optional[_Union[Loss, _Mapping]] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., workers: _Optional[int] = ..., device: _Optional[_Union[Device, str]] = ..., gpus_per_worker: _Optional[float] = ..., seed: _Optional[int] = ..., on_nan: _Optional[_Union[OnNan, str]] = ..., require_sharding: bool = ..., labels: _Optional[_Mapping[str, str]] = ..., durability: _Optional[_Union[Durability, str]] = ..., checkpoint_every: _Optional[int] = ..., keep_checkpoints: _Optional[int] = ..., clip_grad_norm: _Optional[float] = ..., clip_grad_value: _Optional[float] = ..., precision: _Optional[_Union[Precision, str]] = ..., deterministic: bool = ..., loss_reduction: _Optional[_Union[LossReduction, str]] = ..., state: _Optional[_Union[ModelState, str]] = ..., step: _Optional[int] = ..., sharding: _Optional[_Union[Sharding, _Mapping]] = ..., parameter_count: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., last_error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[_program_pb2.StateTensor, _Mapping]]] = ..., variants: _Optional[_Iterable[_Union[_program_pb2.Variant, _Mapping]]] = ..., rank_rows: _Optional[_Iterable[int]] = ..., architecture: _Optional[str] = ..., sync_batch_norm: bool = ..., compile: bool = ..., compiled: _Optional[_Iterable[_Union[_kernels_pb2.CompiledKernels, _Mapping]]] = ..., waits_for: _Optional[str] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue", "transfer", "compute", "all_reduce", "optimizer", "recovery", "total")
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    ALL_REDUCE_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    RECOVERY_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    queue: float
    transfer: float
    compute: float
    all_reduce: float
    optimizer: float
    recovery: float
    total: float
    def __init__(self, queue: _Optional[float] = ..., transfer: _Optional[float] = ..., compute: _Optional[float] = ..., all_reduce: _Optional[float] = ..., optimizer: _Optional[float] = ..., recovery: _Optional[float] = ..., total: _Optional[float] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("loss", "step", "num_examples", "grad_norm", "learning_rate", "timing", "rank_rows", "skipped", "loss_scale")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    RANK_ROWS_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    LOSS_SCALE_FIELD_NUMBER: _ClassVar[int]
    loss: float
    step: int
    num_examples: int
    grad_norm: float
    learning_rate: float
    timing: Timing
    rank_rows: _containers.RepeatedScalarFieldContainer[int]
    skipped: bool
    loss_scale: float
    def __init__(self, loss: _Optional[float] = ..., step: _Optional[int] = ..., num_examples: _Optional[int] = ..., grad_norm: _Optional[float] = ..., learning_rate: _Optional[float] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., rank_rows: _Optional[_Iterable[int]] = ..., skipped: bool = ..., loss_scale: _Optional[float] = ...) -> None: ...

class Command(_message.Message):
    __slots__ = ("name", "state", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: CommandState
    error: _status_pb2.Status
    def __init__(self, name: _Optional[str] = ..., state: _Optional[_Union[CommandState, str]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
