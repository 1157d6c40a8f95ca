"""The channel to one service: how it is opened, its methods, and what grpc's errors mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc.experimental import ChannelOptions

from gradwire.attempts import Lost
from gradwire.errors import Cancelled, DeadlineExceeded, GradwireError, Unavailable
from gradwire.tls import TLS, read_pem
from gradwire_proto.status import from_rpc_error
from gradwire_proto.v1 import gradient_service_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["GradientService"]

_OPTIONS: list[tuple[str, Any]] = [
    # A frozen server or a cut cable is noticed within 20 s, however long the call's timeout.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A server that comes back is found again within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # The service's limit on messages is the one that counts.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # Measured: how far a stream may run ahead of its reader, and large frames. Not without grpc's probes of bandwidth
    # (grpc.http2.bdp_probe), which the service does without: a stream that is reset may then not notice it.
    ("grpc.http2.lookahead_bytes", 4 << 20),
    ("grpc.http2.max_frame_size", 1 << 20),
    # Each client has a connection of its own, as it has a timeout and a token of its own.
    ("grpc.use_local_subchannel_pool", 1),
]

_NEVER_CONNECTED = ("failed to connect", "DNS resolution failed")
"""What grpc says of a call that was never sent; nothing but its words tells."""

_CUT = ("Stream removed", "RST_STREAM")
"""What grpc says of a stream that the other side, or the network, cut off, whatever the code."""


def open_channel(target: str, tls: TLS | None) -> grpc.Channel:
    """A channel to `target`, "host:port". It connects when the first call is made."""
    # The thread that waits for an answer reads it: faster than a hop between threads, and Ctrl-C can cancel the call.
    options = [*_options(target), (ChannelOptions.SingleThreadedUnaryStream, 1)]
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, _credentials(tls), options=options)


def open_async_channel(target: str, tls: TLS | None) -> grpc.aio.Channel:
    """The same for the running event loop, without attempts that grpc makes by itself."""
    options = [*_options(target), ("grpc.enable_retries", 0)]
    if tls is None:
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, _credentials(tls), options=options)


def _options(target: str) -> list[tuple[str, Any]]:
    is_here = target.startswith(("127.", "localhost", "[::1]"))
    return [*_OPTIONS, *([("grpc.enable_http_proxy", 0)] if is_here else [])]


def _credentials(tls: TLS) -> grpc.ChannelCredentials:
    certificate, key = read_pem(tls.certificate, "tls.certificate"), read_pem(tls.key, "tls.key")
    return grpc.ssl_channel_credentials(read_pem(tls.ca, "tls.ca"), key, certificate)


def bind(channel: grpc.Channel, name: str) -> Callable[..., Any]:
    """The callable of one RPC, which takes bytes. Unary ones are read as streams of one: SingleThreadedUnaryStream."""
    method = _SERVICE.methods_by_name[name]
    if method.client_streaming:
        make = channel.stream_stream if method.server_streaming else channel.stream_unary
    else:
        make = channel.unary_stream
    # These are the caller's to parse: it needs no copy of the bytes in them.
    parse = None if name == "DownloadTensors" else GetMessageClass(method.output_type).FromString
    return make(f"/{_SERVICE.full_name}/{name}", response_deserializer=parse)


def translate(error: Any, target: str, command: str | None, *, closed: bool) -> Lost | GradwireError:
    """What the grpc error of a call stands for. closed: whether the channel was closed on this side."""
    request_id = command.rpartition("/")[2] if command else None
    translated = from_rpc_error(error, command=command is not None, request_id=request_id)
    if any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ()):
        return translated
    details = error.details() or ""
    attributes: dict[str, Any] = translated.attributes()
    if isinstance(translated, DeadlineExceeded):
        attributes["reason"] = "NO_ANSWER"
        return Lost(DeadlineExceeded("no answer in time", **attributes))
    if isinstance(translated, Unavailable) and any(words in details for words in _NEVER_CONNECTED):
        attributes |= {"reason": "NOT_CONNECTED", "outcome": "not_applied"}
        return Lost(Unavailable(f"no gradwire service answers at {target}: {details}", **attributes))
    # A service that is torn down cancels its calls.
    is_cut = isinstance(translated, Unavailable) or (isinstance(translated, Cancelled) and not closed)
    if is_cut or any(words in details for words in _CUT):
        attributes |= {"reason": "CONNECTION_LOST", "retryable": True}
        return Lost(Unavailable(f"the connection to {target} was lost: {details}", **attributes))
    return translated
