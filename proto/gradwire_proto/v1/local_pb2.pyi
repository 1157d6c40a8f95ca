from google.rpc import status_pb2 as _status_pb2
from gradwire_proto.v1 import gradient_service_pb2 as _gradient_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LocalRequest(_message.Message):
    __slots__ = ("hello", "upload", "download", "call")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    DOWNLOAD_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    hello: LocalHello
    upload: LocalUpload
    download: LocalDownload
    call: LocalCall
    def __init__(self, hello: _Optional[_Union[LocalHello, _Mapping]] = ..., upload: _Optional[_Union[LocalUpload, _Mapping]] = ..., download: _Optional[_Union[LocalDownload, _Mapping]] = ..., call: _Optional[_Union[LocalCall, _Mapping]] = ...) -> None: ...

class LocalHello(_message.Message):
    __slots__ = ("token",)
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    token: str
    def __init__(self, token: _Optional[str] = ...) -> None: ...

class LocalUpload(_message.Message):
    __slots__ = ("manifest",)
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    manifest: _gradient_service_pb2.UploadManifest
    def __init__(self, manifest: _Optional[_Union[_gradient_service_pb2.UploadManifest, _Mapping]] = ...) -> None: ...

class LocalDownload(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LocalCall(_message.Message):
    __slots__ = ("method", "request", "timeout_seconds", "request_bytes")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    method: str
    request: bytes
    timeout_seconds: float
    request_bytes: int
    def __init__(self, method: _Optional[str] = ..., request: _Optional[bytes] = ..., timeout_seconds: _Optional[float] = ..., request_bytes: _Optional[int] = ...) -> None: ...

class LocalReply(_message.Message):
    __slots__ = ("welcome", "uploaded", "downloaded", "refusal", "response", "error", "response_bytes", "brought")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    UPLOADED_FIELD_NUMBER: _ClassVar[int]
    DOWNLOADED_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BROUGHT_FIELD_NUMBER: _ClassVar[int]
    welcome: LocalWelcome
    uploaded: LocalUploaded
    downloaded: LocalDownloaded
    refusal: LocalRefusal
    response: bytes
    error: _status_pb2.Status
    response_bytes: int
    brought: LocalBrought
    def __init__(self, welcome: _Optional[_Union[LocalWelcome, _Mapping]] = ..., uploaded: _Optional[_Union[LocalUploaded, _Mapping]] = ..., downloaded: _Optional[_Union[LocalDownloaded, _Mapping]] = ..., refusal: _Optional[_Union[LocalRefusal, _Mapping]] = ..., response: _Optional[bytes] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., response_bytes: _Optional[int] = ..., brought: _Optional[_Union[LocalBrought, _Mapping]] = ...) -> None: ...

class LocalWelcome(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class LocalUploaded(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class LocalDownloaded(_message.Message):
    __slots__ = ("places",)
    PLACES_FIELD_NUMBER: _ClassVar[int]
    places: _containers.RepeatedCompositeFieldContainer[LocalPlace]
    def __init__(self, places: _Optional[_Iterable[_Union[LocalPlace, _Mapping]]] = ...) -> None: ...

class LocalBrought(_message.Message):
    __slots__ = ("name", "places")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    name: str
    places: _containers.RepeatedCompositeFieldContainer[LocalPlace]
    def __init__(self, name: _Optional[str] = ..., places: _Optional[_Iterable[_Union[LocalPlace, _Mapping]]] = ...) -> None: ...

class LocalPlace(_message.Message):
    __slots__ = ("file", "offset", "nbytes")
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    file: int
    offset: int
    nbytes: int
    def __init__(self, file: _Optional[int] = ..., offset: _Optional[int] = ..., nbytes: _Optional[int] = ...) -> None: ...

class LocalRefusal(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: str
    message: str
    def __init__(self, reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
