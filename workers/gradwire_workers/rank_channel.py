"""The frontend's end of one rank's hot path: a ZeroMQ pair over a Unix socket, read from the asyncio loop.

The socket's file descriptor is watched by the loop itself (0.1 ms a round trip, where zmq.asyncio takes 0.3), and
nothing polls: an idle channel costs no CPU. A rank whose process is gone is noticed from the closed connection, in
flight or idle, and every call that waits for it ends with RankLost. So is one that is stopped: ZeroMQ's own thread in
a rank's process answers heartbeats, whatever the rank computes, and none come from a process that stands still.

A small command goes past ZeroMQ, see direct_socket.py, if no other is unanswered: of several at once, ZeroMQ's threads
see to the next while the rank is at the first. What comes directly was sent before what comes by ZeroMQ, and is taken
first, by the rank as here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from gradwire_proto.errors import GradwireError, RankLost, by_name
from gradwire_workers import direct_socket
from gradwire_workers.frames import Encoded, Frame, pack, unpack
from gradwire_workers.step_rows import StepRow, decode_part

# Frames above this are handed to ZeroMQ uncopied; below, the bookkeeping costs more than the copy.
_COPY_BELOW = 64 << 10

# Plain numbers: zmq's own flags are enums, whose `|` and `&` take longer than the calls.
_NOBLOCK, _MORE, _POLLIN = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE), int(zmq.POLLIN)

# Only the frontend asks: a rank whose frontend stands still for a while stays. Whoever does not answer within the
# second of these is lost, after both of them together at the latest.
_HEARTBEAT_MILLISECONDS = 500
_SILENCE_MILLISECONDS = 2500


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a rank answered: fields, or an error. `busy`: seconds that it worked on the command.

    needs_rejoin: the failure broke the rank's process group.
    """

    fields: dict[str, Any]
    error: GradwireError | None
    needs_rejoin: bool
    busy: float


class RankChannel:
    """Calls to one rank. All methods belong to the event loop's thread."""

    def __init__(self, context: zmq.Context, endpoint: str, name: str) -> None:
        self.name = name
        self.lost: RankLost | None = None
        self.on_lost: Callable[[RankLost], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._takers: dict[int, Callable[[list[StepRow]], None]] = {}
        self._last_call = 0
        self._closed = False
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        # A rank that is gone stays gone: nobody else may take its address.
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MILLISECONDS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _SILENCE_MILLISECONDS)
        self._socket.copy_threshold = _COPY_BELOW
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        self._socket.connect(endpoint)
        path = direct_socket.direct_path(endpoint)
        self._direct = None if path is None else direct_socket.connect(path)
        if self._direct is not None:
            self._loop.add_reader(self._direct, self._read_direct)
        self._descriptors = (self._socket.getsockopt(zmq.FD), self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptors[0], self._read)
        self._loop.add_reader(self._descriptors[1], self._watch)
        # The descriptors signal changes only: what came before they were watched must be looked for.
        self._loop.call_soon(self._watch)

    def call(
        self,
        kind: str,
        fields: Mapping[str, Any] | Encoded | None = None,
        take: Callable[[list[StepRow]], None] | None = None,
    ) -> asyncio.Future[Answer]:
        """Sends a command at once. The future holds what the rank answers, an error that it raised included.

        take: called with the rows of an answer that comes in parts, as they come, and before the future is done.

        RankLost (outcome unknown) when the rank dies before it answers.
        """
        answer = self._loop.create_future()
        if self._closed:
            answer.set_exception(self.lost or RankLost(f"{self.name} is closed"))
            return answer
        self._last_call += 1
        frames = pack({"call": self._last_call, "kind": kind, "fields": fields or {}})
        is_alone = not self._waiting
        self._waiting[self._last_call] = answer
        if take is not None:
            self._takers[self._last_call] = take
        if not (is_alone and self._send_directly(frames)):
            self._send_by_zmq(frames)
        return answer

    def _send_directly(self, frames: Sequence[Frame]) -> bool:
        if self._direct is None:
            return False
        try:
            return direct_socket.send(self._direct, frames)
        except OSError:
            # The rank is gone, which ZeroMQ finds too.
            return False

    def _send_by_zmq(self, frames: Sequence[Frame]) -> None:
        try:
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE, copy=False)
            self._socket.send(frames[-1], _NOBLOCK, copy=False)
        except zmq.ZMQError:
            # There is no connection any more, and the news of it has not been read yet.
            self._fail()
            return
        # Sending may swallow the signal that something came in.
        if _has_news(self._socket):
            self._loop.call_soon(self._read)

    def close(self) -> None:
        """Lets the rank go: it leaves by itself when the connection ends."""
        self._end(RankLost(f"{self.name} was closed", reason="RANK_CLOSED", outcome="unknown"))

    def _read(self) -> None:
        while not self._closed and _has_news(self._socket):
            while self._read_direct():
                pass
            self._told(self._socket.recv_multipart(_NOBLOCK))

    def _read_direct(self) -> bool:
        """Whether a message was there."""
        if self._direct is None:
            return False
        try:
            frames = direct_socket.receive(self._direct)
        except BlockingIOError:
            return False
        except OSError:
            frames = None
        if frames is None:
            # What becomes of the rank, ZeroMQ will tell.
            self._leave_direct()
            return False
        self._told(frames)
        return True

    def _told(self, frames: Sequence[Frame]) -> None:
        part = decode_part(frames)
        if part is None:
            message = unpack(frames)
            error = message.get("error")
            self._answered(
                message["call"],
                fields=message.get("result") or {},
                error=decode_error(error) if error else None,
                needs_rejoin=message.get("needs_rejoin", False),
                busy=message["busy"],
            )
            return
        take = self._takers.get(part.call)
        if take is not None and part.rows:
            take(part.rows)
        if part.is_over:
            self._answered(part.call, fields={}, error=None, needs_rejoin=False, busy=part.busy)

    def _answered(self, call: int, **answered: Any) -> None:
        self._takers.pop(call, None)
        answer = self._waiting.pop(call, None)
        if answer is not None and not answer.done():
            answer.set_result(Answer(**answered))

    def _leave_direct(self) -> None:
        if self._direct is not None:
            self._loop.remove_reader(self._direct)
            self._direct.close()
            self._direct = None

    def _watch(self) -> None:
        while not self._closed and _has_news(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(_NOBLOCK))
            if event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                # What the rank said before it died still counts.
                while self._read_direct():
                    pass
                self._read()
                self._fail()

    def _fail(self) -> None:
        if self.lost is None:
            self.lost = RankLost(f"{self.name} died, stopped or was disconnected", outcome="unknown")
            self._end(self.lost)
            if self.on_lost is not None:
                self.on_lost(self.lost)

    def _end(self, error: RankLost) -> None:
        if self._closed:
            return
        self._closed = True
        self._leave_direct()
        for descriptor in self._descriptors:
            self._loop.remove_reader(descriptor)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        waiting, self._waiting = self._waiting, {}
        for answer in waiting.values():
            if not answer.done():
                answer.set_exception(error)


def _has_news(socket: zmq.Socket) -> bool:
    """Whether something came in."""
    return bool(socket.getsockopt(zmq.EVENTS) & _POLLIN)  # type: ignore[operator]


def encode_error(error: GradwireError) -> dict[str, Any]:
    """An error as a message's plain values."""
    return {"class": type(error).__name__, "message": error.message, "attributes": error.attributes()}


def decode_error(error: Mapping[str, Any]) -> GradwireError:
    """The error that `encode_error` described."""
    return by_name(error["class"])(error["message"], **error["attributes"])
