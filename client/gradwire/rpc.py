"""Calls to the service: the connection, deadlines, credentials, errors. With channel.py, all that knows grpc.

`Rpc.call` returns the result of one request or raises a GradwireError, by its deadline, save to fetch tensors of the
result that travel apart. A call whose answer was lost, or that the service cannot take now, is
sent again until then; where that does not help, the service is asked what became of a command, and the error's
`outcome` says so.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from typing import Any

import grpc

from gradwire.attempts import Attempts, Lost, is_passing
from gradwire.channel import bind, open_channel, translate
from gradwire.deadline import Deadline
from gradwire.errors import FailedPrecondition, GradwireError, Unavailable
from gradwire.exchange import Exchange
from gradwire.local_calls import LOCAL_CALLS, LocalCalls
from gradwire.local_transport import LocalTransport
from gradwire.stall_watch import StallWatch
from gradwire.tls import TLS
from gradwire_proto.v1 import gradient_service_pb2 as pb

_ABANDONED: list[grpc.Channel] = []
"""Channels in which a call was interrupted by Ctrl-C: see `Rpc._break_off`. Each keeps its socket and thread until the
process ends."""


def new_request_id() -> str:
    """A fresh UUID for one command: one of version 4, as uuid.uuid4 makes them, in a quarter of its time."""
    drawn = os.urandom(16).hex()
    variant = "89ab"[int(drawn[16], 16) & 3]
    return f"{drawn[:8]}-{drawn[8:12]}-4{drawn[13:16]}-{variant}{drawn[17:20]}-{drawn[20:]}"


class Rpc:
    """One channel to one service. Threads may share it; a forked child must make its own.

    target: "host:port". token: sent with every call. tls: None is plain text. timeout: seconds that a call of the SDK
    may take at most, in all its requests; what it downloads may stand still for as many. shared_memory: whether `local`
    may be used, and calls go past gRPC.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        tls: TLS | None = None,
        timeout: float = 60.0,
        shared_memory: bool = True,
    ) -> None:
        self.target = target
        self.local = LocalTransport(self._local_socket, enabled=shared_memory, timeout=timeout, token=token)
        self._local_calls = LocalCalls(self.local, target)
        self.timeout = timeout
        self.closed = threading.Event()
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls = tls
        self._channel = open_channel(target, tls)
        self._methods: dict[str, Any] = {}
        self._process = os.getpid()

    def call(
        self,
        method: str,
        request: Any,
        *,
        deadline: Deadline | None = None,
        finish: Callable[[Any], Any] = lambda reply: reply,
        **how: Any,
    ) -> Any:
        """Send `request` to `method`, again where that helps, and return the reply, by `deadline`.

        deadline: that of the call of the SDK of which this is a part; None where it is all of it. finish: makes the
        result of the reply. how: what `Exchange` takes besides, such as command="models/{model}/commands/{request_id}".

        Raises the GradwireError that the service answered; Unavailable where no live service answers; DeadlineExceeded
        where a live one was too slow; Interrupted on Ctrl-C during a command.
        """
        bound = Deadline(self.timeout) if deadline is None else deadline

        def finished(reply: Any) -> Any:
            self.local.look_again(bound)
            return finish(reply)

        # Serialized once: every attempt has the same bytes.
        exchange = Exchange(method=method, body=request.SerializeToString(), finish=finished, **how)
        return exchange.run(self, bound)

    def upload(
        self,
        messages: Callable[[], Iterable[bytes]],
        deadline: Deadline,
        *,
        may_take_longer: bool = True,
    ) -> None:
        """Stream the messages of UploadTensors, serialized, anew where the stream breaks, until `deadline`.

        may_take_longer: a stream that never stands still until the deadline has the time that it needs; what it took
        does not count where it arrived.
        """
        with deadline.running():
            attempts = Attempts(deadline, self.closed)
            while True:
                began = time.monotonic()
                try:
                    self._upload_once(messages(), max(deadline.left, 0.001), may_take_longer)
                except GradwireError as error:
                    if not is_passing(error) or not attempts.wait(error, self.until_connected):
                        raise
                else:
                    if may_take_longer:
                        deadline.give_back(time.monotonic() - began)
                    return

    def download(self, request: pb.DownloadTensorsRequest, since: float | None = None) -> Iterator[bytes]:
        """Yield the messages of DownloadTensors, serialized. The timeout bounds the wait for each, not for all.

        since: from when on the first is waited for, in monotonic seconds, where that was before.
        """
        return self.stream("DownloadTensors", request, since)

    def stream(self, method: str, request: Any, since: float | None = None) -> Generator[Any, None, None]:
        """Yield the messages that answer one request. The timeout bounds the wait for each, and nothing that is done
        with them. Closed early, it ends.
        """
        call = self._method(method)(request.SerializeToString(), metadata=self._metadata)
        with StallWatch(self.timeout, call.cancel, since) as watch:
            try:
                yield from watch.coming(call)
            except grpc.RpcError as error:
                raise self._stream_error(error, watch) from None
            except KeyboardInterrupt:
                self._break_off(call)
                raise
            except BaseException:
                call.cancel()
                raise

    def converse(self, method: str, bodies: Iterator[bytes]) -> Any:
        """A stream both ways, open until `bodies` end and what they ask for is answered: iterate over the replies.

        `bodies` are sent as they come, from a thread. `cancel()` ends it. What iterating raises, `lost` explains.
        """
        return self._method(method)(bodies, metadata=self._metadata)

    def lost(self, error: Exception) -> GradwireError | None:
        """What the error that such a stream ended with stands for; None where it is none of grpc's."""
        if not isinstance(error, grpc.RpcError):
            return None
        translated = translate(error, self.target, None, closed=self.closed.is_set())
        return translated.error if isinstance(translated, Lost) else translated

    def send(self, method: str, body: bytes, timeout: float, command: str | None = None, **options: Any) -> Any:
        """One attempt. Raises Lost where the service did not say what went wrong, GradwireError where it did."""
        call: Any = None
        if method in LOCAL_CALLS and not options:
            self.check_usable()
            reply = self._local_calls.ask(method, body, timeout, command)
            if reply is not None:
                return reply
        try:
            call = self._method(method)(body, timeout=max(timeout, 0.001), metadata=self._metadata, **options)
            # To the end: a stream that is not read to its end is never freed, nor is its connection.
            (reply,) = call
            return reply
        except grpc.RpcError as error:
            raise translate(error, self.target, command, closed=self.closed.is_set()) from None
        except KeyboardInterrupt:
            self._break_off(call)
            raise

    def ask(self, method: str, request: Any, timeout: float) -> Any:
        """One attempt, which raises a GradwireError where it fails."""
        try:
            return self.send(method, request.SerializeToString(), timeout)
        except Lost as lost:
            raise lost.error from None

    def until_connected(self, seconds: float) -> None:
        """Return when the service is there, or after `seconds`."""
        # A channel looks for its service only while a call waits on it; others fail as the last attempt to connect did.
        with suppress(Lost, GradwireError):
            self.send("GetServerInfo", b"", seconds, wait_for_ready=True)

    def close(self) -> None:
        """Close the channel. Calls in flight raise Cancelled. Does nothing in a forked child: its parent goes on."""
        if self.is_owner and not self.closed.is_set():
            self.closed.set()
            self._channel.close()
            self.local.close()
            self._local_calls.close()

    @property
    def is_owner(self) -> bool:
        """Whether this is the process that opened the channel, not a forked child of it."""
        return os.getpid() == self._process

    def check_usable(self) -> None:
        """Raise FailedPrecondition where no call can be made: CLIENT_CLOSED, or CLIENT_FORKED in a forked child."""
        if self.closed.is_set():
            raise FailedPrecondition("the client is closed", reason="CLIENT_CLOSED")
        if not self.is_owner:
            message = f"this client belongs to process {self._process}; call gradwire.connect in each process"
            raise FailedPrecondition(message, reason="CLIENT_FORKED")

    def _local_socket(self, seconds: float) -> str:
        return self.ask("GetServerInfo", pb.GetServerInfoRequest(), seconds).local_socket

    def _upload_once(self, messages: Iterable[bytes], seconds: float, may_take_longer: bool) -> None:
        method = self._method("UploadTensors")
        call: Any = None
        with StallWatch(seconds, lambda: call.cancel()) as watch:
            timeout = None if may_take_longer else seconds
            call = method.future(watch.over(messages), timeout=timeout, metadata=self._metadata)
            try:
                call.result()
            except grpc.RpcError as error:
                raise self._stream_error(error, watch) from None
            except grpc.FutureCancelledError:
                # Which says nothing; the call itself does.
                raise self._stream_error(call, watch) from None
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
        if not self.closed.is_set():
            _ABANDONED.append(self._channel)
            self._methods, self._channel = {}, open_channel(self.target, self._tls)

    def _method(self, name: str) -> Any:
        self.check_usable()
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = bind(self._channel, name)
        return method

    def _stream_error(self, error: Any, watch: StallWatch) -> GradwireError:
        if watch.stalled:
            message = f"{self.target} took or sent no bytes for {watch.patience:.3g} s"
            return Unavailable(message, reason="NO_ANSWER")
        translated = translate(error, self.target, None, closed=self.closed.is_set())
        return translated.error if isinstance(translated, Lost) else translated
