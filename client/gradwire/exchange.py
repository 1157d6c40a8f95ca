"""One call from the first attempt to its result: sent again where that helps, and explained where it does not.

A command has the same request id and bytes in every attempt, so that the service runs it once, however often it comes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from gradwire import outcome
from gradwire.attempts import Attempts, Lost, is_passing
from gradwire.deadline import Deadline
from gradwire.errors import (
    Cancelled,
    CheckpointNotFound,
    DatasetNotFound,
    DeadlineExceeded,
    GradwireError,
    Interrupted,
    ModelNotFound,
    Unavailable,
)

_INTERRUPT_PATIENCE = 5.0
"""Seconds that Ctrl-C waits to learn what became of a command. A second Ctrl-C ends the wait."""


class Sender(Protocol):
    """What an exchange needs of the connection. `send` raises Lost or GradwireError; `closed` ends every wait."""

    target: str
    closed: threading.Event

    def send(self, method: str, body: bytes, timeout: float, command: str | None = None) -> Any: ...

    def ask(self, method: str, request: Any, timeout: float) -> Any: ...

    def until_connected(self, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """What is to be sent, and what to do with the reply.

    command: "models/{model}/commands/{request_id}" where the request changes a model. finish: makes the result of the
    reply, and may fetch more of it. send_again: brings what the service must have before the request, by a deadline;
    None where there is nothing. deletes: whether a repeat that finds nothing has succeeded. repeat: whether to send
    again at all. kept: seconds before the deadline that its caller needs afterwards.
    """

    method: str
    body: bytes
    command: str | None = None
    finish: Callable[[Any], Any] = lambda reply: reply
    send_again: Callable[[Deadline], None] | None = None
    deletes: bool = False
    repeat: bool = True
    kept: float = 0.0

    def run(self, sender: Sender, deadline: Deadline, *, may_have_arrived: bool = False) -> Any:
        """The result, by `deadline` less the seconds `kept`. What `finish` fetches may take longer, if it moves.

        may_have_arrived: whether the request was sent before, by another way, and may have been carried out.
        """
        with deadline.running():
            return _Running(self, sender, deadline, may_have_arrived).run()

    @property
    def request_id(self) -> str | None:
        """The command's id."""
        return self.command.rpartition("/")[2] if self.command else None


class _Unfetched(Exception):
    """The service answered, and the rest of its answer could not be had: `error` says why."""

    def __init__(self, error: GradwireError) -> None:
        super().__init__(error)
        self.error = error


class _Running:
    """An exchange under way. may_have_arrived: whether an attempt may have been carried out: one whose answer was lost,
    or of which the service itself does not know.

    is_upload_gone: whether the tensors that the request names must be brought again before it.
    """

    def __init__(self, exchange: Exchange, sender: Sender, deadline: Deadline, may_have_arrived: bool) -> None:
        self._exchange = exchange
        self._sender = sender
        self._deadline = deadline
        self._kept_for_asking = outcome.reserve(deadline.left)
        self._attempts = Attempts(deadline, sender.closed, exchange.kept + self._kept_for_asking)
        self._may_have_arrived = may_have_arrived
        self._is_upload_gone = False
        self._is_answered = False
        self._reply: Any = None

    def run(self) -> Any:
        try:
            while True:
                try:
                    return self._attempt()
                except (Lost, _Unfetched, GradwireError) as failure:
                    if not self._comes_again(failure):
                        error = self._explain(failure)
                        break
        except KeyboardInterrupt:
            if self._exchange.command is None:
                raise
            self._interrupted(self._exchange.command)
        raise error from None

    def _attempt(self) -> Any:
        exchange = self._exchange
        self._bring_again()
        had_arrived, self._may_have_arrived = self._may_have_arrived, True
        try:
            reply = self._sender.send(exchange.method, exchange.body, self._seconds_for_attempt(), exchange.command)
        except Lost as lost:
            self._set_may_have_arrived(had_arrived or lost.error.reason != "NOT_CONNECTED")
            raise
        except (ModelNotFound, CheckpointNotFound, DatasetNotFound):
            self._may_have_arrived = had_arrived
            if not (exchange.deletes and had_arrived):
                raise
            reply = None
        except GradwireError as error:
            self._set_may_have_arrived(had_arrived or error.outcome == "unknown")
            raise
        reply_before, self._is_answered, self._reply = self._reply, True, reply
        try:
            return exchange.finish(reply)
        except GradwireError as error:
            # Asked again, a command has the same reply: what is gone of it stays gone.
            gone = error.reason == "DOWNLOAD_NOT_FOUND" and reply != reply_before
            raise _Unfetched(error) if gone or is_passing(error) else self._as_answered(error) from None

    def _set_may_have_arrived(self, may_have_arrived: bool) -> None:
        self._may_have_arrived = may_have_arrived
        # Nobody will be asked about what cannot have arrived: all of the time is there to wait for a connection.
        self._attempts.kept = self._exchange.kept + (self._kept_for_asking if may_have_arrived else 0.0)

    def _seconds_for_attempt(self) -> float:
        """So many that what is left after them is enough for asking what became of it."""
        left = self._deadline.left - self._exchange.kept
        return min(self._attempts.seconds_left, left - outcome.reserve(left))

    def _bring_again(self) -> None:
        """Upload again what the service has lost."""
        if not self._is_upload_gone or self._exchange.send_again is None:
            return
        try:
            self._exchange.send_again(self._deadline.within(self._attempts.seconds_left))
        except GradwireError as error:
            # Of the upload: the command itself was not sent again.
            raise _with(error, self._standing("not_applied")) from None
        self._is_upload_gone = False

    def _comes_again(self, failure: Lost | _Unfetched | GradwireError) -> bool:
        """Wait where another attempt may go better. False: it is over."""
        if not self._exchange.repeat:
            return False
        error = failure if isinstance(failure, GradwireError) else failure.error
        is_upload_gone = error.reason == "UPLOAD_NOT_FOUND" and self._exchange.send_again is not None
        self._is_upload_gone |= is_upload_gone
        if not (is_upload_gone or isinstance(failure, _Unfetched) or is_passing(error)):
            return False
        return self._attempts.wait(error, self._sender.until_connected)

    def _explain(self, failure: Lost | _Unfetched | GradwireError) -> GradwireError:
        """The error of the last attempt, with what the service says about the command."""
        if isinstance(failure, _Unfetched):
            return self._as_answered(failure.error)
        if self._sender.closed.is_set() and (isinstance(failure, Lost) or self._is_cut_short(failure)):
            message = "the client was closed before the service had answered"
            return Cancelled(message, reason="CLIENT_CLOSED", **self._standing(self._unasked()))
        if isinstance(failure, Lost):
            return self._explain_loss(failure.error)
        if self._exchange.command is None or not self._may_have_arrived or failure.outcome != "not_applied":
            return failure
        # An earlier attempt may have been carried out.
        return _with(failure, self._standing(self._ask().outcome))

    def _is_cut_short(self, failure: GradwireError) -> bool:
        """Whether a client that was closed kept the call from being sent again."""
        return is_passing(failure) or (failure.reason == "CLIENT_CLOSED" and self._may_have_arrived)

    def _explain_loss(self, error: GradwireError) -> GradwireError:
        """`error`, with what became of the command; Unavailable where the service is dead, not slow."""
        if error.reason == "NOT_CONNECTED":
            return _with(error, self._standing(self._unasked()))
        standing, within = self._ask(), f"within {self._deadline.seconds:g} s"
        attributes: dict[str, Any] = error.attributes() | self._standing(standing.outcome)
        if not isinstance(error, DeadlineExceeded):
            return type(error)(error.message, **attributes)
        if not standing.alive:
            attributes |= {"reason": "NO_ANSWER", "retryable": True}
            return Unavailable(f"{self._sender.target} did not answer {within}", **attributes)
        words = {"applied": "; it was applied", "unknown": "; it may be applied yet"}.get(attributes["outcome"], "")
        return DeadlineExceeded(f"the call did not end {within}{words}", **attributes)

    def _as_answered(self, error: GradwireError) -> GradwireError:
        return error if self._exchange.command is None else _with(error, self._standing("applied"))

    def _ask(self) -> outcome.Standing:
        left = Attempts(self._deadline, self._sender.closed, self._exchange.kept)
        standing = outcome.ask(self._sender.ask, self._exchange.command, left)
        is_known = self._exchange.command is not None and not self._is_answered
        return standing if is_known else outcome.Standing(standing.alive, self._unasked())

    def _unasked(self) -> str:
        """What is known of the outcome without asking."""
        if self._is_answered and self._exchange.command is not None:
            return "applied"
        changes = self._exchange.command is not None or self._exchange.deletes
        return "unknown" if changes and self._may_have_arrived else "not_applied"

    def _standing(self, word: str) -> dict[str, Any]:
        return {"outcome": word, "request_id": self._exchange.request_id}

    def _interrupted(self, command: str) -> NoReturn:
        word = self._unasked()
        if word == "unknown":
            patience = Deadline(_INTERRUPT_PATIENCE)
            with patience.running():
                word = outcome.ask(self._sender.ask, command, Attempts(patience, self._sender.closed)).outcome
        words = {"applied": "was applied", "not_applied": "was not applied", "unknown": "may have been applied"}
        request_id = self._exchange.request_id
        message = f"interrupted: the command {words[word]} (request {request_id})"
        raise Interrupted(message, outcome=word, request_id=request_id) from None


def _with(error: GradwireError, attributes: dict[str, Any]) -> GradwireError:
    return type(error)(error.message, **error.attributes() | attributes)
