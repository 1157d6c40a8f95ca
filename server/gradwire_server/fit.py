"""One fit: its steps as commands of the model, some at a time, and what is told of them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument, Unavailable
from gradwire_proto.values import FitPlan, FitProgress, FitSteps, StepsResult
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.evaluation import Validation
from gradwire_server.fingerprints import fingerprint
from gradwire_server.fit_commands import FitCommands, Reached
from gradwire_server.fit_pace import Pace
from gradwire_server.fit_records import FIT_STEPS
from gradwire_server.fit_refusals import step_refusal
from gradwire_server.storage.dataset_files import StoredDataset

_KEPT = 256
"""Commands of a fit whose replies are kept for a client that comes back: half a minute."""

MOST_SHUFFLED = 1 << 27
"""Rows whose order is made anew for each epoch: each rank has a gibibyte of it then, and other requests wait for it."""


@dataclass(slots=True)
class _Command:
    """Steps to before `end`; None: they are those of another call. loss: told before them."""

    call: Call
    end: int | None
    loss: float | None
    result: asyncio.Future[StepsResult | None] = field(init=False)


class Fit:
    """See the module. What was applied of it by an earlier call with its request id is told, and not applied again.

    validation: whose loss is told after each epoch.
    """

    def __init__(
        self,
        model_id: str,
        commands: Commands,
        fitting: FitCommands,
        plan: FitPlan,
        dataset: StoredDataset,
        validation: StoredDataset | None,
        request_id: str,
    ) -> None:
        self.request_id = request_id
        self.stopped = plan.stop
        """Whether no more steps begin."""
        self.draining = False
        self._model_id = model_id
        self._commands = commands
        self._fitting = fitting
        self._plan = plan
        self._dataset = dataset
        examples = dataset.info.num_examples
        self._batch_size = min(plan.batch_size or examples, examples)
        self._per_epoch = -(-examples // self._batch_size)
        self._total = plan.epochs * self._per_epoch
        self._may_bring_variant = examples % self._batch_size != 0
        """Whether no command of this call has begun with a batch that is smaller than the others."""
        if plan.completed_steps > self._total:
            raise InvalidArgument(
                f"the fit has {self._total} steps, got {plan.completed_steps}",
                field="completed_steps",
                reason="INTEGER_OUT_OF_RANGE",
            )
        if plan.shuffle and examples > MOST_SHUFFLED:
            message = f"expected at most {MOST_SHUFFLED} rows to shuffle, got {examples}"
            raise InvalidArgument(message, field="shuffle", reason="DATASET_ROWS")
        self._pace = Pace()
        self._validation = Validation(fitting, validation, self._batch_size, self._per_epoch)
        self._reached = Reached(-1)
        self._heard: deque[Call] = deque()
        # Whatever was asked of it, but for where a repeat goes on: the same id with another is another fit.
        asked = replace(plan, completed_steps=0, stop=False)
        self._identity = repr((asked, dataset.upload, None if validation is None else validation.upload)).encode()

    async def progress(self) -> AsyncGenerator[FitProgress, None]:
        """What happens, as it happens; ends when all is done, or it was stopped. Raises what refuses a step."""
        done = self._plan.completed_steps
        under_way: deque[_Command] = deque()
        try:
            while done < self._total:
                if not under_way:
                    loss = None
                    if self._validation.comes_after(done):
                        evaluation = self._validation.after(done)
                        # Where another call of the fit was sooner, its steps have the loss, and the model is another.
                        while (loss := evaluation.loss) is None and self._may_begin(done):
                            await evaluation.go_on()
                            yield self._told(done)
                    found = self._begin(done, loss)
                    under_way.extend([] if found is None else [found])
                if not under_way:
                    return
                current = under_way[0]
                if current.loss is not None:
                    yield self._told(done, current.loss)
                # It is in the queue then, or it is known that another call was sooner.
                await asyncio.sleep(0)
                if current.end is not None and self._may_look_ahead(current.end):
                    ahead = self._begin(current.end, None, ahead=True)
                    under_way.extend([] if ahead is None else [ahead])
                result = await current.result
                under_way.popleft()
                if result is None:
                    continue  # It was there when it was looked for, and has not been applied.
                if current.loss is None and result.validation_loss is not None:
                    yield self._told(done, result.validation_loss)
                yield self._applied(done, result)
                self._forget_old(current.call)
                done += len(result.losses)
                if result.error is not None:
                    raise step_refusal(result.error, done, self._per_epoch)
        finally:
            # What has not begun yet is given up, where nobody else waits for it.
            for each in under_way:
                each.result.cancel()
            await asyncio.gather(*(each.result for each in under_way), return_exceptions=True)
        loss = None
        if self._validation.comes_after(done):
            evaluation = self._validation.after(done)
            while not self.stopped and loss is None:
                await evaluation.go_on()
                yield self._told(done)
                loss = evaluation.loss
                if loss is None:
                    self._check_not_draining()
        yield replace(self._told(done, loss), done=True)

    def _begin(self, first: int, loss: float | None, *, ahead: bool = False) -> _Command | None:
        """The command whose first step is `first`: found, or begun. None: no more are to begin.

        loss: that is told before it. ahead: it follows one that still runs.
        """
        call, end = self._call(first), None
        if self._may_begin(first, ahead=ahead):
            if not ahead:
                self._reached.step = first
            end = first + self._count(first)
            call = self._with_steps(call, first, end, loss)
        elif self._commands.log.find(call) is None:
            return None
        command = _Command(call, end, None if end is None else loss)
        command.result = asyncio.ensure_future(self._run(command, first))
        return command

    def _may_begin(self, first: int, *, ahead: bool = False) -> bool:
        """Whether the command whose first step is `first` is to begin, and has not begun yet."""
        if self._commands.log.find(self._call(first)) is not None:
            return False
        if not ahead:
            self._check_goes_on(first)
        if not self.stopped:
            self._check_not_draining()
        return not self.stopped

    def _check_not_draining(self) -> None:
        if self.draining:
            raise Unavailable("the service is stopping", reason="DRAINING", retry_after=1.0)

    def _check_goes_on(self, first: int) -> None:
        """Refuse to apply steps once more whose losses are not stored any more, and to leave some out."""
        known = self._fitting.end_of(self.request_id)
        if known is None or first == known:
            return
        if first > known:
            message = f"{known} steps of the fit were applied, got {first}"
            raise InvalidArgument(message, field="completed_steps", reason="INTEGER_OUT_OF_RANGE")
        message = f"steps {first} to {known - 1} of the fit were applied, and their losses are no longer stored"
        raise FailedPrecondition(message, reason="REPLY_FORGOTTEN", outcome="applied")

    def _forget_old(self, call: Call) -> None:
        """A client that comes back has heard of what was long ago."""
        self._heard.append(call)
        if len(self._heard) > _KEPT:
            self._commands.log.forget(self._heard.popleft())

    def _may_look_ahead(self, end: int) -> bool:
        """Whether the ranks need not wait for what is told of a command that ends there before they have the next."""
        is_told_first = self._validation.comes_after(end)
        is_last = end >= self._total
        return self._pace.is_known and not (is_last or is_told_first or self.stopped or self.draining)

    def _call(self, first: int) -> Call:
        """The command that begins with step `first`; how many steps it has may differ between repeats."""
        return Call(
            method=FIT_STEPS,
            request_id=str(uuid.uuid5(uuid.UUID(self.request_id), str(first))),
            body=fingerprint(FIT_STEPS, self._identity + b"%d" % first),
            body_checks=False,
        )

    def _count(self, first: int) -> int:
        steps = min(self._pace.steps, self._total - first)
        rest = self._per_epoch - first % self._per_epoch
        if self._may_bring_variant:
            # The epoch's last batch is the first of its size: where a step before it is refused, the record must not
            # miss a variant that the ranks have got.
            steps, self._may_bring_variant = min(steps, rest - 1) or steps, rest > 1
        # Not beyond the epoch, where the loss after it comes first.
        return min(steps, rest) if self._validation.is_wanted else steps

    def _with_steps(self, call: Call, first: int, end: int, loss: float | None) -> Call:
        asked = FitSteps(
            fit=self.request_id,
            dataset=self._dataset.info,
            first_step=first,
            steps=end - first,
            batch_size=self._batch_size,
            seed=self._plan.seed if self._plan.shuffle else None,
            validation_loss=loss,
        )
        request = codec.encode_fit_steps(asked, self._model_id, call.request_id or "")
        return replace(call, raw=request.SerializeToString(), arrived=time.monotonic())

    async def _run(self, command: _Command, first: int) -> StepsResult | None:
        """None: it was begun by another call, and is to be begun again."""
        call = command.call
        try:
            if self._commands.log.find(call) is not None:
                command.end = None
            if call.raw:
                result = await self._fitting.apply(call, self._dataset, self._reached)
            else:
                result = await self._fitting.join(call)
        except GradwireError as error:
            raise step_refusal(error, first, self._per_epoch) from None
        if result is None:
            return None
        timing = result.timing
        self._pace.took(len(result.losses), timing.compute + timing.all_reduce + timing.optimizer)
        return result

    def _told(self, done: int, loss: float | None = None) -> FitProgress:
        """The loss after the epoch that has just ended; None: that it is being computed."""
        return FitProgress(first_step=done, epoch=done // self._per_epoch - 1, validation_loss=loss)

    def _applied(self, first: int, result: StepsResult) -> FitProgress:
        return FitProgress(
            first_step=first,
            losses=result.losses,
            step=result.step,
            epoch=(first + len(result.losses) - 1) // self._per_epoch,
            timing=result.timing,
        )
