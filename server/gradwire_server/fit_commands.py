"""What fits ask of one model: some steps as a command, and what is read between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gradwire_proto import codec
from gradwire_proto.errors import Cancelled, GradwireError, InternalError
from gradwire_proto.v1.dataset_pb2 import FitStepsRequest, FitStepsResponse
from gradwire_proto.values import Batch, BatchLosses, FitSteps, StepsResult
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.fit_records import FIT_STEPS, decode_steps_result
from gradwire_server.storage.dataset_files import StoredDataset, batch_of
from gradwire_server.workers import Workers

_FITS = 256
"""Of how many fits it is known how far they came."""


@dataclass(slots=True)
class Reached:
    """`step`: where a call of a fit has gone on last, when all before was settled. Commands behind that may be begun
    ahead of it.
    """

    step: int


@dataclass(frozen=True, slots=True)
class _End:
    """How many steps of a fit were applied, and the number of the last of them."""

    step: int
    number: int


class FitCommands:
    """See the module. `workers` gives the model's ranks, as they are now."""

    def __init__(self, commands: Commands, workers: Callable[[], Workers]) -> None:
        self._commands = commands
        self._workers = workers
        self._ends: OrderedDict[str, _End] = OrderedDict()
        commands.on_undone(self._goes_back_to)

    def end_of(self, fit: str) -> int | None:
        """How many steps of the fit with that request id were applied; None where none is known of."""
        if (end := self._ends.get(fit)) is not None:
            return end.step
        # Of one that came back with a checkpoint, the replies alone tell.
        stored = map(FitStepsResponse.FromString, self._commands.log.replies_of(FIT_STEPS))
        return max((decode_steps_result(each).end for each in stored if each.fit == fit), default=None)

    def _note(self, result: StepsResult, number: int) -> None:
        self._ends[result.fit] = _End(result.end, number)
        self._ends.move_to_end(result.fit)
        if len(self._ends) > _FITS:
            self._ends.popitem(last=False)

    def _goes_back_to(self, number: int) -> None:
        self._ends = OrderedDict((fit, end) for fit, end in self._ends.items() if end.number <= number)

    def _check_follows(self, steps: FitSteps, reached: Reached) -> None:
        end = self._ends.get(steps.fit)
        if steps.first_step != reached.step and (end is None or end.step != steps.first_step):
            raise Cancelled("the steps before these are not applied; nothing was applied")

    async def apply(
        self, call: Call, dataset: StoredDataset | None = None, reached: Reached | None = None
    ) -> StepsResult:
        """Apply the steps of the record in `call`, once for its request id, as far as they go.

        Without a dataset they are applied once more, of a record that has kept the tensors. reached: they are refused,
        with Cancelled, where they are begun ahead, and those before them are not applied when their turn comes.
        """

        async def work(_: Any, __: int) -> StepsResult:
            steps = codec.decode_fit_steps(FitStepsRequest.FromString(call.raw))
            if reached is not None:
                self._check_follows(steps, reached)
            examples, most = self._examples(call, dataset), None
            before = self._commands.number
            if call.replay is not None:
                most = call.replay.number - before
            result = await self._workers().fitting.run(examples, steps, most=most, command=before + 1)
            if most is not None and len(result.losses) < most:
                raise result.error or InternalError("fewer steps were applied than the first time", outcome="unknown")
            told = {"fit": steps.fit, "first_step": steps.first_step, "validation_loss": steps.validation_loss}
            result = replace(result, **told)
            self._note(result, before + len(result.losses))
            return result

        return await self._commands.run(call, None, work, dataset=dataset)

    async def join(self, call: Call) -> StepsResult | None:
        """The result of a command that was seen before; None where it must be begun as a new one."""
        return await self._commands.join(call)

    def _examples(self, call: Call, dataset: StoredDataset | None) -> Batch:
        if dataset is not None:
            return dataset.batch
        assert call.replay is not None, "what a client asks for names a dataset"
        (tensors,) = call.replay.uploads.values()
        info = codec.decode_dataset(FitStepsRequest.FromString(call.raw).dataset)
        return batch_of(info, tensors)

    def let_go(self) -> None:
        """Have the ranks let go of what they have mapped, in their turn. Nobody waits for it."""
        with suppress(GradwireError):  # Of a model that is on its way out.
            self._commands.begin(Call(), None, lambda _: self._workers().fitting.forget())

    async def evaluate(self, dataset: StoredDataset, batch_size: int, *, first: int, most: int) -> BatchLosses:
        """See FitWorkers.evaluate."""
        batch = dataset.batch

        def work(_: Any) -> Awaitable[BatchLosses]:
            return self._workers().fitting.evaluate(batch, batch_size, first=first, most=most)

        # Where there was room for the first of them, the others need not begin anew for want of it.
        return await self._commands.read(Call(), None, work, limited=first == 0)
