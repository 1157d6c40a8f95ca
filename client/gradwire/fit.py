"""Training on a dataset of the service: the loop runs there, and what comes back is progress."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import fields, replace
from typing import Any

from gradwire.arguments import argument_of
from gradwire.attempts import Attempts, is_passing
from gradwire.deadline import Deadline
from gradwire.errors import Cancelled, GradwireError, InternalError, Interrupted
from gradwire.fit_results import FitResult, FitStatus
from gradwire.rpc import Rpc, new_request_id
from gradwire_proto import codec
from gradwire_proto.values import FitPlan, FitProgress, Timing

Callback = Callable[[FitStatus], object]

_INTERRUPT_PATIENCE = 5.0
"""Seconds that Ctrl-C waits to learn how many steps were applied. A second Ctrl-C ends the wait."""


class _Stopped(Exception):
    """A callback has said that it is enough."""


class Fit:
    """A fit under way: what is known of it, however often its connection breaks."""

    def __init__(self, rpc: Rpc, model_id: str, plan: FitPlan, *, per_epoch: int) -> None:
        self.total = plan.epochs * per_epoch
        self._rpc = rpc
        self._model_id = model_id
        self._plan = plan
        self._per_epoch = per_epoch
        self._request_id = new_request_id()
        self._began = self._heard_at = time.monotonic()
        self._losses: list[float] = []
        self._validation_losses: list[float] = []
        self._step = 0
        self._timing = Timing()
        self._is_unsure = False
        """Whether steps may have been applied of which nothing was heard."""

    def run(self, callbacks: Sequence[Callback]) -> FitResult:
        """Train to the end, or until a callback returns False or raises."""
        try:
            self._until_done(callbacks)
        except _Stopped:
            self._settle(self._rpc.timeout)
            return self._result(stopped=True)
        except KeyboardInterrupt:
            self._interrupted()
        except GradwireError:
            raise
        except BaseException:
            # What a callback raises ends the fit: the steps that were under way are applied when this returns.
            with suppress(GradwireError):
                self._settle(self._rpc.timeout)
            raise
        return self._result()

    def _until_done(self, callbacks: Sequence[Callback]) -> None:
        deadline = Deadline.begun(self._rpc.timeout)
        attempts = Attempts(deadline, self._rpc.closed)
        while True:
            before, began = self._known, time.monotonic()
            try:
                if self._attempt(callbacks):
                    return
            except GradwireError as error:
                if self._known > before:
                    deadline = Deadline.begun(self._rpc.timeout)
                    attempts = Attempts(deadline, self._rpc.closed)
                elif self._heard_at > began:
                    # A validation came on, however long it took.
                    deadline.give_back(self._heard_at - began)
                if not is_passing(error) or not attempts.wait(error, self._rpc.until_connected):
                    raise self._explained(error) from None

    def _attempt(self, callbacks: Sequence[Callback], *, stop: bool = False) -> bool:
        """Read the stream to its end; whether the fit is done."""
        plan = replace(self._plan, completed_steps=len(self._losses), stop=stop)
        request = codec.encode_fit_plan(plan, self._model_id, self._request_id)
        is_heard = False
        try:
            with closing(self._rpc.stream("Fit", request)) as messages:
                for message in messages:
                    is_heard = True
                    news = codec.decode_fit_progress(message)
                    self._hear(news, callbacks)
                    # Behind the callbacks: their time is not the service's.
                    self._heard_at = time.monotonic()
                    if news.done:
                        return True
        except GradwireError as error:
            self._note_end(error, is_heard)
            raise
        return False

    @property
    def _known(self) -> int:
        """How many losses have come."""
        return len(self._losses) + len(self._validation_losses)

    def _note_end(self, error: GradwireError, is_heard: bool) -> None:
        """Note what the error of a stream, of which something was heard or not, leaves open."""
        is_cut = error.reason in _LOST or error.outcome == "unknown" or isinstance(error, (Cancelled, InternalError))
        if is_cut or (is_heard and is_passing(error)):
            self._is_unsure = True
        elif is_heard or "were applied" in error.message:
            # Before it refuses a step for good, the service tells of all that were applied.
            self._is_unsure = False

    def _hear(self, news: FitProgress, callbacks: Sequence[Callback]) -> None:
        self._losses += news.losses
        if news.losses:
            self._step = news.step
            self._timing = _sum(self._timing, news.timing)
        validated = news.validation_loss
        if validated is not None and news.epoch == len(self._validation_losses):
            self._validation_losses.append(validated)
        elif not news.losses:
            # A repeat has told once more what is known, or a validation goes on.
            return
        status = FitStatus(
            steps=len(self._losses),
            total_steps=self.total,
            epoch=news.epoch,
            epochs=self._plan.epochs,
            losses=news.losses,
            validation_loss=validated,
            seconds=time.monotonic() - self._began,
        )
        answers = [callback(status) for callback in callbacks]
        if any(answer is False for answer in answers):
            raise _Stopped

    def _settle(self, seconds: float) -> None:
        """Have no more steps begun, and hear of those that were."""
        self._is_unsure = True
        attempts = Attempts(Deadline.begun(seconds), self._rpc.closed)
        while True:
            try:
                self._attempt((), stop=True)
                return
            except GradwireError as error:
                if not is_passing(error) or not attempts.wait(error, self._rpc.until_connected):
                    raise self._explained(error) from None

    def _interrupted(self) -> None:
        known = False
        with suppress(GradwireError):
            self._settle(_INTERRUPT_PATIENCE)
            known = True
        count = len(self._losses)
        outcome = "unknown" if not known else "applied" if count else "not_applied"
        words = f"{count} of {self.total} steps were applied" if known else f"at least {count} steps were applied"
        message = f"interrupted: {words} (request {self._request_id})"
        raise Interrupted(message, outcome=outcome, request_id=self._request_id) from None

    def _explained(self, error: GradwireError) -> GradwireError:
        count = len(self._losses)
        field = argument_of(error.field, {"dataset": "data", "validation_dataset": "validation"})
        attributes: dict[str, Any] = error.attributes() | {"request_id": self._request_id, "field": field}
        if self._is_unsure:
            attributes["outcome"] = "unknown"
            return type(error)(f"{error.message}; at least {count} steps of the fit were applied", **attributes)
        if count:
            attributes["outcome"] = "applied"
        if not count or "were applied" in error.message:
            return type(error)(error.message, **attributes)
        return type(error)(f"{error.message}; {count} steps of the fit were applied", **attributes)

    def _result(self, *, stopped: bool = False) -> FitResult:
        return FitResult(
            losses=tuple(self._losses),
            steps=len(self._losses),
            step=self._step,
            epochs=len(self._losses) // self._per_epoch,
            validation_losses=tuple(self._validation_losses),
            seconds=time.monotonic() - self._began,
            timing=self._timing,
            stopped=stopped,
        )


_LOST = {"CONNECTION_LOST", "NO_ANSWER"}
"""Reasons of errors of streams that the service did not end."""


def _sum(one: Timing, other: Timing) -> Timing:
    return Timing(**{each.name: getattr(one, each.name) + getattr(other, each.name) for each in fields(Timing)})
