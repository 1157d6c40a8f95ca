"""Which requests were seen, by request id, and what became of them: a repeat gets the first answer."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, ModelNotFound
from gradwire_proto.values import CommandInfo
from gradwire_server.calls import Call
from gradwire_server.fingerprints import fits
from gradwire_server.stored_replies import EndedCommand


class Seen(Protocol):
    """A request that waits, runs or has ended."""

    @property
    def ended(self) -> bool: ...

    @property
    def error(self) -> GradwireError | None: ...

    async def wait(self) -> None: ...


R = TypeVar("R", bound=Seen)


@dataclass(slots=True)
class _Entry(Generic[R]):
    """`stored`: what the storage has of it, once it has been applied."""

    body: bytes
    request: R | EndedCommand | None
    reply_bytes: int = 0
    stored: EndedCommand | None = None


class RequestLog(Generic[R]):
    """The newest `capacity` requests with an id. Older ones that have ended are forgotten: a repeat of theirs is a new
    request.

    Replies that together have more than `reply_bytes` go earlier, oldest first; what became of the request stays known.
    """

    def __init__(self, capacity: int, reply_bytes: int) -> None:
        self._capacity = capacity
        self._room = reply_bytes
        self._entries: OrderedDict[str, _Entry[R]] = OrderedDict()

    def find(self, call: Call) -> R | EndedCommand | None:
        """The request that `call` repeats; None where it is a new one, or repeats one that may be tried again.

        Raises InvalidArgument REQUEST_ID_REUSED where the id was given to another request, and FailedPrecondition
        REPLY_FORGOTTEN where the reply is no longer stored.
        """
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is None:
            return None
        if not fits(entry.body, call.body, call.method, call.raw):
            raise InvalidArgument(
                f"{call.request_id} was the id of another request; each needs its own",
                field="request_id",
                reason="REQUEST_ID_REUSED",
            )
        if entry.request is None:
            raise FailedPrecondition(
                f"{call.request_id} was applied, and its reply is no longer stored",
                reason="REPLY_FORGOTTEN",
                outcome="applied",
            )
        return None if _may_run_again(entry.request.error) else entry.request

    def add(self, call: Call, request: R | EndedCommand) -> None:
        """Remember the request, if it has an id."""
        if call.request_id is None:
            return
        self._remember(call, request)

    def _remember(self, call: Call, request: R | EndedCommand) -> None:
        assert call.request_id is not None
        self.forget(call)
        self._entries[call.request_id] = _Entry(call.body, request)
        if len(self._entries) > self._capacity:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        """Not one that waits or runs: its repeat would run beside it."""
        surplus = len(self._entries) - self._capacity
        ended = (each for each, entry in self._entries.items() if entry.request is None or entry.request.ended)
        for request_id in list(islice(ended, surplus)):
            self._room += self._entries.pop(request_id).reply_bytes

    def store(self, call: Call, ended: EndedCommand) -> None:
        """The storage knows from now on what became of the request of `call`."""
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is not None:
            entry.stored = ended

    def settle(self, call: Call) -> None:
        """The request of `call` has ended: what is stored of it takes its place, if its reply is there."""
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is None or entry.request is None or entry.stored is None:
            return
        if entry.request.error is None and entry.stored.reply is not None:
            entry.request = entry.stored

    def restore(self, request_id: str, body: bytes, ended: EndedCommand) -> None:
        """Remember a request of an earlier process of the service, unless it is known."""
        if request_id in self._entries:
            return
        call = Call(request_id=request_id, body=body)
        self._remember(call, ended)
        self.store(call, ended)
        self.weigh(call, len(ended.reply or b""))

    def goes_back_to(self, number: int) -> None:
        """Commands behind this number are undone: what was stored of them is not so."""
        for entry in self._entries.values():
            if entry.stored is not None and entry.stored.number > number:
                entry.stored = None

    def stored(self) -> Iterator[tuple[str, bytes, EndedCommand]]:
        """(request id, body, what is stored of it) of those requests that were applied, oldest first."""
        for request_id, entry in self._entries.items():
            if entry.stored is not None:
                yield request_id, entry.body, entry.stored

    def weigh(self, call: Call, reply_bytes: int) -> None:
        """Count the bytes of the reply of `call`, and forget the oldest replies if they are too many together."""
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is None:
            return
        self._room += entry.reply_bytes - reply_bytes
        entry.reply_bytes = reply_bytes
        for old in self._entries.values():
            if self._room >= 0:
                break
            # What runs has no record yet: its repeat must not hear that it was applied.
            if old.reply_bytes and old.request is not None and old.request.ended:
                self._room += old.reply_bytes
                old.request, old.reply_bytes = None, 0
                if old.stored is not None:
                    old.stored.reply = old.stored.answer = None

    def get(self, request_id: str) -> R | EndedCommand | None:
        """The request with that id, whatever its body; None where it ended well and its reply is no longer stored.

        Raises ModelNotFound COMMAND_NOT_FOUND.
        """
        entry = self._entries.get(request_id)
        if entry is None:
            raise ModelNotFound(
                f"no command with the request id {request_id} is known here", field="name", reason="COMMAND_NOT_FOUND"
            )
        return entry.request

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def forget(self, call: Call) -> None:
        """Drop the request of `call`."""
        entry = self._entries.pop(call.request_id, None) if call.request_id is not None else None
        if entry is not None:
            self._room += entry.reply_bytes


async def deletion_ended(deletion: asyncio.Task[None], log: RequestLog[Any], call: Call) -> None:
    """Wait for a deletion, which goes on without its callers. Once it has succeeded, a repeat of `call` finds it done:
    what was made under the same name since is another's.
    """

    def note(ended: asyncio.Task[None]) -> None:
        if not ended.cancelled() and ended.exception() is None:
            log.add(call, EndedCommand(0, call.method, b""))

    # Not by whoever waits: a caller whose connection broke is not there to note it.
    deletion.add_done_callback(note)
    await asyncio.shield(deletion)


async def command_info(name: str, request: Seen | None, *, wait: bool) -> CommandInfo:
    """What became of a request that `RequestLog.get` gave; with `wait`, once it has ended.

    Raises the request's own error where nobody knows what became of it.
    """
    if request is not None and wait:
        await request.wait()
    if request is not None and not request.ended:
        return CommandInfo(name=name, state="running")
    error = request.error if request is not None else None
    if error is None or error.outcome == "applied":
        return CommandInfo(name=name, state="applied")
    if error.outcome == "unknown":
        raise copy.copy(error)
    return CommandInfo(name=name, state="not_applied", error=str(error))


def _may_run_again(error: GradwireError | None) -> bool:
    """Whether a request that ended so was never begun, or met a limit that may be gone."""
    if error is None or error.outcome != "not_applied":
        return False
    return error.retryable or error.reason in ("CANCELLED", "DEADLINE_EXCEEDED")
