from google.api import field_behavior_pb2 as _field_behavior_pb2
from google.api import field_info_pb2 as _field_info_pb2
from google.api import resource_pb2 as _resource_pb2
from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from gradwire_proto.v1 import model_pb2 as _model_pb2
from gradwire_proto.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dataset(_message.Message):
    __slots__ = ("name", "inputs", "targets", "num_examples", "size_bytes", "create_time", "ttl")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    name: str
    inputs: _tensor_pb2.Value
    targets: _tensor_pb2.Value
    num_examples: int
    size_bytes: int
    create_time: _timestamp_pb2.Timestamp
    ttl: _duration_pb2.Duration
    def __init__(self, name: _Optional[str] = ..., inputs: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., targets: _Optional[_Union[_tensor_pb2.Value, _Mapping]] = ..., num_examples: _Optional[int] = ..., size_bytes: _Optional[int] = ..., create_time: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., ttl: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class CreateDatasetRequest(_message.Message):
    __slots__ = ("dataset_id", "batch", "request_id", "ttl")
    DATASET_ID_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    dataset_id: str
    batch: _tensor_pb2.Batch
    request_id: str
    ttl: _duration_pb2.Duration
    def __init__(self, dataset_id: _Optional[str] = ..., batch: _Optional[_Union[_tensor_pb2.Batch, _Mapping]] = ..., request_id: _Optional[str] = ..., ttl: _Optional[_Union[_duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GetDatasetRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class ListDatasetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDatasetsResponse(_message.Message):
    __slots__ = ("datasets", "next_page_token")
    DATASETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    datasets: _containers.RepeatedCompositeFieldContainer[Dataset]
    next_page_token: str
    def __init__(self, datasets: _Optional[_Iterable[_Union[Dataset, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeleteDatasetRequest(_message.Message):
    __slots__ = ("name", "request_id")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    name: str
    request_id: str
    def __init__(self, name: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...

class FitRequest(_message.Message):
    __slots__ = ("name", "dataset", "epochs", "batch_size", "shuffle", "seed", "validation_dataset", "request_id", "completed_steps", "stop")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    SHUFFLE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_DATASET_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_STEPS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    name: str
    dataset: str
    epochs: int
    batch_size: int
    shuffle: bool
    seed: int
    validation_dataset: str
    request_id: str
    completed_steps: int
    stop: bool
    def __init__(self, name: _Optional[str] = ..., dataset: _Optional[str] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., shuffle: bool = ..., seed: _Optional[int] = ..., validation_dataset: _Optional[str] = ..., request_id: _Optional[str] = ..., completed_steps: _Optional[int] = ..., stop: bool = ...) -> None: ...

class FitResponse(_message.Message):
    __slots__ = ("first_step", "losses", "step", "epoch", "validation_loss", "timing", "done")
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    first_step: int
    losses: _containers.RepeatedScalarFieldContainer[float]
    step: int
    epoch: int
    validation_loss: float
    timing: _model_pb2.Timing
    done: bool
    def __init__(self, first_step: _Optional[int] = ..., losses: _Optional[_Iterable[float]] = ..., step: _Optional[int] = ..., epoch: _Optional[int] = ..., validation_loss: _Optional[float] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ..., done: bool = ...) -> None: ...

class FitStepsRequest(_message.Message):
    __slots__ = ("name", "dataset", "first_step", "steps", "batch_size", "rows", "validation_loss", "request_id", "fit", "seed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DATASET_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    name: str
    dataset: Dataset
    first_step: int
    steps: int
    batch_size: int
    rows: bytes
    validation_loss: float
    request_id: str
    fit: str
    seed: int
    def __init__(self, name: _Optional[str] = ..., dataset: _Optional[_Union[Dataset, _Mapping]] = ..., first_step: _Optional[int] = ..., steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., rows: _Optional[bytes] = ..., validation_loss: _Optional[float] = ..., request_id: _Optional[str] = ..., fit: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class FitStepsResponse(_message.Message):
    __slots__ = ("losses", "step", "timing", "validation_loss", "error", "fit", "first_step")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_LOSS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    losses: _containers.RepeatedScalarFieldContainer[float]
    step: int
    timing: _model_pb2.Timing
    validation_loss: float
    error: _status_pb2.Status
    fit: str
    first_step: int
    def __init__(self, losses: _Optional[_Iterable[float]] = ..., step: _Optional[int] = ..., timing: _Optional[_Union[_model_pb2.Timing, _Mapping]] = ..., validation_loss: _Optional[float] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., fit: _Optional[str] = ..., first_step: _Optional[int] = ...) -> None: ...
