"""What fits ask of one model: some steps as a command, and what is read between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from gradwire_proto import codec
from gradwire_proto.errors import Cancelled, GradwireError, InternalError
from gradwire_proto.v1.dataset_pb2 import FitStepsRequest, FitStepsResponse
from gradwire_proto.values import Batch, StepsResult
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.fit_records import FIT_STEPS, decode_steps_result
from gradwire_server.storage.dataset_files import StoredDataset, batch_of
from gradwire_server.workers import Workers

_FITS = 256
"""Of how many fits it is known how far they came."""


@dataclass(slots=True)
class Reached:
    """How many steps of a fit were applied when its last command ended."""

    step: int


class FitCommands:
    """See the module. `workers` gives the model's ranks, as they are now."""

    def __init__(self, commands: Commands, workers: Callable[[], Workers]) -> None:
        self._commands = commands
        self._workers = workers
        self._ends: OrderedDict[str, int] = OrderedDict()

    def end_of(self, fit: str) -> int | None:
        """How many steps of the fit with that request id were applied; None where none is known of."""
        if (end := self._ends.get(fit)) is not None:
            return end
        # Of one that came back with a checkpoint, the replies alone tell.
        stored = map(FitStepsResponse.FromString, self._commands.log.replies_of(FIT_STEPS))
        return max((decode_steps_result(each).end for each in stored if each.fit == fit), default=None)

    def _note(self, result: StepsResult) -> None:
        self._ends[result.fit] = result.end
        self._ends.move_to_end(result.fit)
        if len(self._ends) > _FITS:
            self._ends.popitem(last=False)

    async def apply(
        self, call: Call, dataset: StoredDataset | None = None, reached: Reached | None = None
    ) -> StepsResult:
        """Apply the steps of the record in `call`, once for its request id, as far as they go.

        Without a dataset they are applied once more, of a record that has kept the tensors. reached: they are refused,
        with Cancelled, unless those before them were all applied.
        """

        async def work(_: Any, __: int) -> StepsResult:
            steps = codec.decode_fit_steps(FitStepsRequest.FromString(call.raw))
            if reached is not None and reached.step != steps.first_step:
                raise Cancelled("a step before these was refused; nothing was applied")
            examples, most = self._examples(call, dataset), None
            before = self._commands.number
            if call.replay is not None:
                most = call.replay.number - before
            result = await self._workers().fitting.run(examples, steps, most=most, command=before + 1)
            if most is not None and len(result.losses) < most:
                raise result.error or InternalError("fewer steps were applied than the first time", outcome="unknown")
            if reached is not None:
                reached.step += len(result.losses)
            told = {"fit": steps.fit, "first_step": steps.first_step, "validation_loss": steps.validation_loss}
            result = replace(result, **told)
            self._note(result)
            return result

        return await self._commands.run(call, None, work, dataset=dataset)

    def _examples(self, call: Call, dataset: StoredDataset | None) -> Batch:
        if dataset is not None:
            return dataset.batch
        assert call.replay is not None, "what a client asks for names a dataset"
        (tensors,) = call.replay.uploads.values()
        info = codec.decode_dataset(FitStepsRequest.FromString(call.raw).dataset)
        return batch_of(info, tensors)

    async def orders(self, rows: int, seeds: Sequence[int]) -> list[bytes]:
        """See FitWorkers.orders."""
        return await self._commands.read(Call(), None, lambda _: self._workers().fitting.orders(rows, seeds))

    def let_go(self) -> None:
        """Have the ranks let go of what they have mapped, in their turn. Nobody waits for it."""
        with suppress(GradwireError):  # Of a model that is on its way out.
            self._commands.begin(Call(), None, lambda _: self._workers().fitting.forget())

    async def evaluate(self, dataset: StoredDataset, batch_size: int) -> float:
        """See FitWorkers.evaluate."""
        batch = dataset.batch
        return await self._commands.read(Call(), None, lambda _: self._workers().fitting.evaluate(batch, batch_size))
