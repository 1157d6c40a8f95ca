"""Steps that are sent before those ahead of them are answered: in order, each applied once, whatever breaks.

A step is an Exchange, as it would be alone. Where its stream breaks, or the service cannot take it now, it is settled
as one that goes alone, which knows about repeats, waits and outcomes; those behind it go on in a new stream.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

from gradwire import outcome
from gradwire.attempts import Attempts, is_passing
from gradwire.deadline import Deadline
from gradwire.errors import Cancelled, GradwireError, Unimplemented
from gradwire.exchange import Exchange
from gradwire.rpc import Rpc
from gradwire.step_stream import StepStream
from gradwire_proto.codec import decode_step_result
from gradwire_proto.status import from_status
from gradwire_proto.values import StepResult


class StepPipeline:
    """See the module. Not for several threads."""

    def __init__(self, rpc: Rpc) -> None:
        self.applied = 0
        """Steps of which it is known that they were."""
        self._rpc = rpc
        self._stream: StepStream | None = None
        self._unanswered: deque[Exchange] = deque()
        self._unsent: list[bytes] = []
        self._refusal: GradwireError | None = None
        self._deadline: Deadline | None = None
        """That of the next step, where `results` has begun to wait for it."""
        self._may_have_arrived = False
        """Whether steps that are not answered were in a stream that broke."""

    def __len__(self) -> int:
        """Steps that are not answered yet."""
        return len(self._unanswered)

    def add(self, step: Exchange) -> None:
        """Send this step behind the others, when `flush` is called."""
        self._unanswered.append(step)
        self._unsent.append(step.body)

    def flush(self) -> None:
        """Send what was added, together."""
        if self._unsent and self._refusal is None:
            if self._rpc.closed.is_set():
                word = "unknown" if self._may_have_arrived else "not_applied"
                message = "the client was closed before the service had answered"
                self._refusal = Cancelled(message, reason="CLIENT_CLOSED", outcome=word)
                return
            if self._stream is None:
                self._stream = StepStream(self._rpc)
            self._stream.send(self._unsent)
            self._unsent = []

    def results(self, *, wakes: bool = False) -> list[StepResult]:
        """The results of the next steps, at least one. Waits for the first within the client's timeout.

        wakes: none, where `wake` was called; the next call waits for what was left. Raises the error of the next step:
        `skip` it, or `cancel` all.
        """
        deadline, self._deadline = self._deadline or Deadline(self._rpc.timeout), None
        with deadline.running():
            results = self._receive(deadline, wakes)
        if not results:
            self._deadline = deadline
        return results

    def wake(self) -> None:
        """Have `results` return, if it waits. Any thread may call it."""
        stream = self._stream
        if stream is not None:
            stream.wake()

    def skip(self) -> None:
        """The next step is over, with its error; those behind it will be sent again."""
        self._unanswered.popleft()
        self._unsent = [each.body for each in self._unanswered]

    def finish(self) -> None:
        """Wait until what was sent is applied, or refused; what was not sent is given up."""
        while self._unsent:
            self._unsent.pop()
            self._unanswered.pop()
        with suppress(GradwireError):
            while self._unanswered:
                self.results()
        self.cancel()

    def cancel(self) -> None:
        """Give up what has not been begun."""
        self._unanswered.clear()
        self._unsent.clear()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    def interrupt(self, seconds: float) -> bool:
        """Give up what has not been begun, and count what was: whether all of it is known in so many seconds."""
        unanswered = tuple(self._unanswered)
        self.cancel()
        attempts = Attempts(Deadline.begun(seconds), self._rpc.closed)
        for step in unanswered:
            # One that has not been begun is not from now on, nor is any behind it.
            word = outcome.ask(self._rpc.ask, step.command, attempts).outcome
            if word != "applied":
                return word == "not_applied"
            self.applied += 1
        return True

    def _receive(self, deadline: Deadline, wakes: bool) -> list[StepResult]:
        """See `results`."""
        # What is left then is enough for asking what became of the step.
        kept = outcome.reserve(deadline.seconds)
        self.flush()
        while self._refusal is None:
            assert self._stream is not None, "steps were sent"
            found = self._stream.receive(deadline.left - kept)
            if found is None or isinstance(found, GradwireError):
                self._may_have_arrived |= found is None or not _says_that_none_arrived(found)
                break
            if results := self._take(found):
                return results
            if wakes and not found and deadline.left > kept:
                return []
        return [self._settle(deadline)]

    def _take(self, outcomes: Any) -> list[StepResult]:
        """The results among the next outcomes, up to the first error, which is kept."""
        results: list[StepResult] = []
        for each in outcomes:
            if each.WhichOneof("outcome") != "result":
                self._refusal = from_status(each.error)
                break
            self._answered()
            results.append(decode_step_result(each.result))
        return results

    def _settle(self, deadline: Deadline) -> StepResult:
        """The result of the next step, alone; those behind it will be sent again."""
        step, refusal, self._refusal = self._unanswered[0], self._refusal, None
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()
        if refusal is not None and not _may_pass(refusal, step):
            refusal.request_id = refusal.request_id or step.request_id
            raise refusal
        self._may_have_arrived |= refusal is not None and refusal.outcome == "unknown"
        result = step.run(self._rpc, deadline, may_have_arrived=self._may_have_arrived)
        self._answered()
        self._unsent = [each.body for each in self._unanswered]
        self._may_have_arrived &= bool(self._unanswered)
        return result

    def _answered(self) -> None:
        """The next step was applied."""
        self._unanswered.popleft()
        self.applied += 1


def _says_that_none_arrived(error: GradwireError) -> bool:
    """Whether a stream that ended so brought the service nothing: one that is not there, or knows no streams."""
    return error.reason == "NOT_CONNECTED" or isinstance(error, Unimplemented)


def _may_pass(refusal: GradwireError, step: Exchange) -> bool:
    """Whether the step may well succeed alone. One that is the next had nothing refused before it but elsewhere."""
    is_upload_gone = refusal.reason == "UPLOAD_NOT_FOUND" and step.send_again is not None
    return is_upload_gone or refusal.reason == "STEP_BEFORE_REFUSED" or is_passing(refusal)
