"""Which requests were seen, by request id, and what became of them: a repeat gets the first answer."""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Generic, Protocol, TypeVar

from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, ModelNotFound, ResourceExhausted
from gradwire_proto.values import CommandInfo
from gradwire_server.aging import Aging
from gradwire_server.calls import Call
from gradwire_server.fingerprints import fits
from gradwire_server.storage.saved_model import StoredReply, reply_line
from gradwire_server.stored_replies import EndedCommand, stored_reply_of


class Seen(Protocol):
    """A request that waits, runs or has ended."""

    @property
    def ended(self) -> bool: ...

    @property
    def error(self) -> GradwireError | None: ...

    async def wait(self) -> None: ...


R = TypeVar("R", bound=Seen)

_MOST = 32_768
"""Of so many requests whose replies are gone it is known what became of them, at most: of 50 a second.

Each checkpoint holds them, which takes some 5 us for each.
"""


@dataclass(slots=True)
class _Entry(Generic[R]):
    """`stored`: what the storage has of it, once it has been applied. `ended_at`: when it ended, in seconds since 1970,
    or a little later; None where that was not noted yet. `line`: what a checkpoint says of an older one, which took a
    while to find out.
    """

    body: bytes
    request: R | EndedCommand | None
    reply_bytes: int = 0
    stored: EndedCommand | None = None
    ended_at: float | None = None
    line: str | None = None


class RequestLog(Generic[R]):
    """The newest `capacity` requests with an id, with their replies, and what became of older ones.

    Of those that have ended the replies go first: beyond `capacity`, and before that where they have more than
    `reply_bytes` together, oldest first. What became of the request stays known for REMEMBER_SECONDS after its end: a
    repeat hears so, and is not applied again. After that it is a new request. Memory is bounded all the same: beyond
    32,768 of them (or `capacity`, where that is more), about 0.8 KB each, the oldest go even when they are younger.
    `clock`: seconds since 1970, so that what a checkpoint stores ages while no service runs.
    """

    def __init__(self, capacity: int, reply_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self._capacity = capacity
        self._room = reply_bytes
        self._clock = clock
        self._entries: OrderedDict[str, _Entry[R]] = OrderedDict()
        self._older: Aging[_Entry[R]] = Aging(max(_MOST, capacity), clock)
        self._declared: Aging[None] = Aging(max(_MOST, capacity), clock)
        """Ids of which it was told that nothing was applied, before anything came with them."""

    def find(self, call: Call) -> R | EndedCommand | None:
        """The request that `call` repeats; None where it is a new one, or repeats one that may be tried again.

        Raises InvalidArgument REQUEST_ID_REUSED where the id was given to another request, and FailedPrecondition
        REPLY_FORGOTTEN where the reply is no longer stored, DECLARED_NOT_APPLIED where it comes too late: see `get`.
        """
        entry = self._entry(call.request_id) if call.request_id is not None else None
        if entry is None:
            if call.request_id is not None and call.request_id in self._declared:
                raise FailedPrecondition(
                    f"{call.request_id} was declared not applied when somebody asked before it arrived; send it again"
                    " under another id",
                    reason="DECLARED_NOT_APPLIED",
                )
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

    def _entry(self, request_id: str) -> _Entry[R] | None:
        return self._entries.get(request_id) or self._older.get(request_id)

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
            self._leave_replies_of_oldest()

    def _leave_replies_of_oldest(self) -> None:
        """Not of one that waits or runs, or of which nobody knows yet what became of it."""
        surplus = len(self._entries) - self._capacity
        oldest, entry = next(iter(self._entries.items()))
        if surplus == 1 and _is_settled(entry.request):  # As a rule.
            self._leave_reply(oldest, entry)
            return
        known = (each for each, entry in self._entries.items() if _is_settled(entry.request))
        for request_id in list(islice(known, surplus)):
            self._leave_reply(request_id, self._entries[request_id])

    def _leave_reply(self, request_id: str, entry: _Entry[R]) -> None:
        del self._entries[request_id]
        self._room += entry.reply_bytes
        ended_at = self._clock() if entry.ended_at is None else entry.ended_at
        self._older.add(request_id, _without_reply(entry, ended_at), ended_at)

    def store(self, call: Call, ended: EndedCommand) -> None:
        """The storage knows from now on what became of the request of `call`."""
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is not None:
            entry.stored = ended

    def settle(self, call: Call) -> None:
        """The request of `call` has ended: what is stored of it takes its place, if its reply is there, and of one
        that was refused its error alone: the request may be large.
        """
        entry = self._entries.get(call.request_id) if call.request_id is not None else None
        if entry is None:
            return
        entry.ended_at = self._clock()
        if entry.request is None:
            return
        error = entry.request.error
        if error is None:
            entry.request = entry.request if entry.stored is None or entry.stored.reply is None else entry.stored
        elif error.outcome == "not_applied" and entry.stored is None:
            entry.request = _refused(error)

    def restore(self, request_id: str, body: bytes, ended: EndedCommand, ended_at: float | None = None) -> None:
        """Remember a request of an earlier process of the service, unless it is known. ended_at: when it ended, in
        seconds since 1970; None where nobody knows: now.

        One that was applied after it had been refused was refused by a service that was taken over from: that was told
        to nobody.
        """
        known = self._entry(request_id)
        if known is not None and (known.stored is None or known.stored.error is None or ended.error is not None):
            return
        call = Call(request_id=request_id, body=body)
        self._remember(call, ended)
        self.store(call, ended)
        self._entries[request_id].ended_at = self._clock() if ended_at is None else ended_at
        self.weigh(call, len(ended.reply or b""))

    def goes_back_to(self, number: int) -> None:
        """Commands behind this number are undone: what was stored of them is not so."""
        for entry in (*self._older.values(), *self._entries.values()):
            if entry.stored is not None and entry.stored.number > number:
                entry.stored = entry.line = None

    def stored(self) -> Callable[[], tuple[tuple[str, ...], tuple[StoredReply, ...]]]:
        """What a checkpoint holds of the requests that are known now and were applied, oldest first: `older` and
        `replies` of a SavedModel. By a function that takes a while, which a thread may call before the next request
        runs.
        """
        names, now = list(self._entries), self._clock()
        older, entries = list(zip(self._older, self._older.values(), strict=True)), list(self._entries.values())

        def find() -> tuple[tuple[str, ...], tuple[StoredReply, ...]]:
            lines = (entry.line or _note_line(request_id, entry, now) for request_id, entry in older)
            replies = (_stored(request_id, entry, now) for request_id, entry in zip(names, entries, strict=True))
            return tuple(filter(None, lines)), tuple(filter(None, replies))

        return find

    def replies_of(self, method: str) -> list[bytes]:
        """The replies that are stored of the requests of one method, oldest first."""
        known = (entry.stored for entry in (*self._older.values(), *self._entries.values()))
        return [each.reply for each in known if each is not None and each.method == method and each.reply is not None]

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
            # What runs has no record yet, or none that holds: its repeat must not hear that it was applied.
            if old.reply_bytes and old.request is not None and _is_settled(old.request):
                self._room += old.reply_bytes
                old.request, old.reply_bytes = None, 0
                if old.stored is not None:
                    old.stored.reply = old.stored.answer = None

    def get(self, request_id: str) -> R | EndedCommand | None:
        """The request with that id, whatever its body; None where it ended well and its reply is no longer stored.

        Raises ModelNotFound COMMAND_NOT_FOUND. Whoever asked goes on as if it had not been applied, and that stays so:
        a first attempt that is still on its way is refused, for as long as requests are known. Of too many to keep that
        promise nothing is said: ResourceExhausted TOO_MANY_UNKNOWN_COMMANDS.
        """
        entry = self._entry(request_id)
        if entry is None:
            if request_id not in self._declared and self._declared.is_full:
                raise ResourceExhausted(
                    "so many commands that are not known here were asked after that of no more can it be promised that"
                    " they are never applied",
                    reason="TOO_MANY_UNKNOWN_COMMANDS",
                )
            self._declared.add(request_id, None, self._clock())
            raise ModelNotFound(
                f"no command with the request id {request_id} is known here", field="name", reason="COMMAND_NOT_FOUND"
            )
        return entry.request

    def __contains__(self, request_id: str) -> bool:
        return self._entry(request_id) is not None

    def forget(self, call: Call) -> None:
        """Drop the request of `call`."""
        if call.request_id is None:
            return
        self._older.pop(call.request_id)
        entry = self._entries.pop(call.request_id, None)
        if entry is not None:
            self._room += entry.reply_bytes


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


def _stored(request_id: str, entry: _Entry[R], now: float) -> StoredReply | None:
    if entry.stored is None:
        return None
    return stored_reply_of(request_id, entry.body, entry.stored, now if entry.ended_at is None else entry.ended_at)


def _note_line(request_id: str, entry: _Entry[R], now: float) -> str | None:
    """What a checkpoint says of an older request, which stays as it is."""
    stored = _stored(request_id, entry, now)
    entry.line = None if stored is None else reply_line(stored)
    return entry.line


def _is_settled(request: Seen | None) -> bool:
    return request is None or (request.ended and (request.error is None or request.error.outcome != "unknown"))


def _without_reply(entry: _Entry[R], ended_at: float) -> _Entry[R]:
    """What is still known of a request without its reply: that it was applied, or its error."""
    stored, failed = entry.stored, None
    if stored is not None:
        stored = EndedCommand(stored.number, stored.method, None, stored.error)
    if entry.request is not None and entry.request.error is not None:
        failed = _refused(entry.request.error)
    return _Entry(entry.body, failed, stored=stored, ended_at=ended_at)


def _refused(error: GradwireError) -> EndedCommand:
    return EndedCommand(0, "", None, copy.copy(error))


def _may_run_again(error: GradwireError | None) -> bool:
    """Whether a request that ended so was never begun, or met a limit that may be gone."""
    if error is None or error.outcome != "not_applied":
        return False
    return error.retryable or error.reason in ("CANCELLED", "DEADLINE_EXCEEDED")
