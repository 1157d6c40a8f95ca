"""Calls to the service, and the only file of the SDK that knows grpc: channel, deadlines, credentials, errors.

`Rpc.call` sends one request and returns the reply or raises a GradwireError; it never outlives its timeout. Where the
answer of a command was lost, the service is asked what became of it, and the error's `outcome` says so.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message_factory import GetMessageClass
from grpc.experimental import ChannelOptions

from gradwire import outcome
from gradwire.errors import DeadlineExceeded, FailedPrecondition, GradwireError, Interrupted, Unavailable
from gradwire.stall_watch import StallWatch
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
    # Each client has a connection of its own, as it has a timeout and a token of its own.
    ("grpc.use_local_subchannel_pool", 1),
    # The thread that waits for an answer reads it: faster than a hop between threads, and Ctrl-C can cancel the call.
    (ChannelOptions.SingleThreadedUnaryStream, 1),
]

_NEVER_CONNECTED = ("failed to connect", "DNS resolution failed")
"""What grpc says of a call that was never sent; nothing but its words tells."""

_ABANDONED: list[grpc.Channel] = []
"""Channels in which a call was interrupted by Ctrl-C: see `Rpc._break_off`."""

_INTERRUPT_PATIENCE = 5.0
"""Seconds that Ctrl-C waits to learn what became of a command. A second Ctrl-C ends the wait."""


def new_request_id() -> str:
    """A fresh UUID for one command."""
    return str(uuid.uuid4())


class Rpc:
    """One channel to one service. Threads may share it; a forked child must make its own.

    target: "host:port". token: sent with every call. tls: None is plain text. timeout: a call's seconds at most; of
    uploads and downloads, the seconds that they may stand still.
    """

    def __init__(self, target: str, *, token: str | None = None, tls: TLS | None = None, timeout: float = 60.0) -> None:
        self.target = target
        self.timeout = timeout
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls = tls
        self._channel = _open_channel(target, tls)
        self._methods: dict[str, Any] = {}
        self._process = os.getpid()
        self._closed = False

    def call(self, method: str, request: Any, *, timeout: float | None = None, command: str | None = None) -> Any:
        """Send `request` to `method` and return the reply, within `timeout` seconds.

        command: "models/{model}/commands/{request_id}" where the request changes a model.

        Raises the GradwireError that the service answered; Unavailable where no live service answers; DeadlineExceeded
        where a live one was too slow; Interrupted on Ctrl-C during a command.
        """
        budget = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + budget
        try:
            return self._send(method, request, budget - outcome.reserve(budget), command)
        except _Lost as lost:
            error = self._explain(lost.error, command, deadline, budget)
        except GradwireError as said_by_service:
            error = said_by_service
        except KeyboardInterrupt:
            if command is None:
                raise
            self._interrupted(command)
        raise error from None

    def upload(self, messages: Iterable[pb.UploadTensorsRequest]) -> pb.UploadTensorsResponse:
        """Stream the messages of UploadTensors. The timeout bounds the wait for each, not for all."""
        method = self._method("UploadTensors")
        call: Any = None
        with StallWatch(self.timeout, lambda: call.cancel()) as watch:
            call = method.future(watch.over(messages), metadata=self._metadata)
            try:
                return call.result()
            except (grpc.RpcError, grpc.FutureCancelledError) as error:
                raise self._stream_error(error, watch) from None
            except KeyboardInterrupt:
                self._break_off(call)
                raise

    def download(self, request: pb.DownloadTensorsRequest) -> Iterator[pb.DownloadTensorsResponse]:
        """Yield the messages of DownloadTensors. The timeout bounds the wait for each, not for all."""
        call = self._method("DownloadTensors")(request, metadata=self._metadata)
        with StallWatch(self.timeout, call.cancel) as watch:
            try:
                yield from watch.over(call)
            except grpc.RpcError as error:
                raise self._stream_error(error, watch) from None
            except KeyboardInterrupt:
                self._break_off(call)
                raise
            except BaseException:
                call.cancel()
                raise

    def close(self) -> None:
        """Close the channel. Calls in flight raise Cancelled. Does nothing in a forked child: its parent goes on."""
        if self.is_owner and not self._closed:
            self._closed = True
            self._channel.close()

    @property
    def is_owner(self) -> bool:
        """Whether this is the process that opened the channel, not a forked child of it."""
        return os.getpid() == self._process

    def _send(self, method: str, request: Any, timeout: float, command: str | None = None) -> Any:
        """One attempt. Raises _Lost where the service did not say what went wrong, GradwireError where it did."""
        call: Any = None
        try:
            call = self._method(method)(request, timeout=timeout, metadata=self._metadata)
            # To the end: a stream that is not read to its end is never freed, nor is its connection.
            (reply,) = call
            return reply
        except grpc.RpcError as error:
            raise _translate(error, self.target, command) from None
        except KeyboardInterrupt:
            self._break_off(call)
            raise

    def _break_off(self, call: Any) -> None:
        """Cancel a call that Ctrl-C has interrupted, and let the calls to come have a channel of their own.

        Ctrl-C may strike between taking one of grpc's locks and noting that it is taken: then whoever wants that lock
        waits for ever. So nothing of the old channel is waited for, or freed.
        """
        if call is not None:
            threading.Thread(target=call.cancel, name="gradwire-cancel", daemon=True).start()
        if not self._closed:
            _ABANDONED.append(self._channel)
            self._methods, self._channel = {}, _open_channel(self.target, self._tls)

    def _explain(self, error: GradwireError, command: str | None, deadline: float, budget: float) -> GradwireError:
        """`error`, with what the service says about `command`; Unavailable where the service is dead, not slow."""
        if error.reason == "NOT_CONNECTED" or self._closed:
            return error
        standing = outcome.ask(self._send_quietly, command, deadline)
        attributes: dict[str, Any] = error.attributes() | {"outcome": standing.outcome}
        if not isinstance(error, DeadlineExceeded):
            return type(error)(error.message, **attributes)
        if not standing.alive:
            attributes |= {"reason": "NO_ANSWER", "retryable": True}
            return Unavailable(f"{self.target} did not answer within {budget:g} s", **attributes)
        words = {"applied": "; it was applied", "unknown": "; it may be applied yet"}.get(standing.outcome, "")
        return DeadlineExceeded(f"the call did not end within {budget:g} s{words}", **attributes)

    def _interrupted(self, command: str) -> NoReturn:
        standing = outcome.ask(self._send_quietly, command, time.monotonic() + _INTERRUPT_PATIENCE)
        words = {"applied": "was applied", "not_applied": "was not applied", "unknown": "may have been applied"}
        request_id = _request_id(command)
        message = f"interrupted: the command {words[standing.outcome]} (request {request_id})"
        raise Interrupted(message, outcome=standing.outcome, request_id=request_id) from None

    def _send_quietly(self, method: str, request: Any, timeout: float) -> Any:
        try:
            return self._send(method, request, max(timeout, 0.001))
        except _Lost as lost:
            raise lost.error from None

    def check_usable(self) -> None:
        """Raise FailedPrecondition where no call can be made: CLIENT_CLOSED, or CLIENT_FORKED in a forked child."""
        if self._closed:
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        if not self.is_owner:
            message = f"this client belongs to process {self._process}; call gradwire.connect in each process"
            raise FailedPrecondition(message, reason="CLIENT_FORKED")

    def _method(self, name: str) -> Any:
        self.check_usable()
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = _bind(self._channel, name)
        return method

    def _stream_error(self, error: Exception, watch: StallWatch) -> GradwireError:
        if watch.stalled:
            message = f"{self.target} took or sent no bytes for {self.timeout:g} s"
            return Unavailable(message, reason="NO_ANSWER")
        translated = _translate(error, self.target)
        return translated.error if isinstance(translated, _Lost) else translated


class _Lost(Exception):
    """The answer was lost: `error` is what grpc makes of it; the service said nothing."""

    def __init__(self, error: GradwireError) -> None:
        super().__init__(error)
        self.error = error


def _translate(error: Any, target: str, command: str | None = None) -> _Lost | GradwireError:
    translated = from_rpc_error(error, command=command is not None, request_id=_request_id(command))
    said_by_service = any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())
    if said_by_service or not isinstance(translated, (DeadlineExceeded, Unavailable)):
        return translated
    attributes: dict[str, Any] = translated.attributes()
    if isinstance(translated, DeadlineExceeded):
        attributes["reason"] = "NO_ANSWER"
        return _Lost(DeadlineExceeded("no answer in time", **attributes))
    if any(words in error.details() for words in _NEVER_CONNECTED):
        attributes |= {"reason": "NOT_CONNECTED", "outcome": "not_applied"}
        return _Lost(Unavailable(f"no gradwire service answers at {target}: {error.details()}", **attributes))
    attributes["reason"] = "CONNECTION_LOST"
    return _Lost(Unavailable(f"the connection to {target} was lost: {error.details()}", **attributes))


def _request_id(command: str | None) -> str | None:
    return command.rpartition("/")[2] if command else None


def _open_channel(target: str, tls: TLS | None) -> grpc.Channel:
    options = list(_OPTIONS)
    if target.startswith(("127.", "localhost", "[::1]")):
        options.append(("grpc.enable_http_proxy", 0))
    if tls is None:
        return grpc.insecure_channel(target, options=options)
    certificate, key = read_pem(tls.certificate, "tls.certificate"), read_pem(tls.key, "tls.key")
    credentials = grpc.ssl_channel_credentials(read_pem(tls.ca, "tls.ca"), key, certificate)
    return grpc.secure_channel(target, credentials, options=options)


def _bind(channel: grpc.Channel, name: str) -> Any:
    """The callable of one RPC. Unary ones are read as streams of one: see SingleThreadedUnaryStream above."""
    method = _SERVICE.methods_by_name[name]
    make = channel.stream_unary if method.client_streaming else channel.unary_stream
    request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    path = f"/{_SERVICE.full_name}/{name}"
    return make(path, request_serializer=request.SerializeToString, response_deserializer=response.FromString)
