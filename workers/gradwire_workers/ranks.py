"""Some ranks as one callee: a command goes to each, and comes back as all their answers or as one error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire_proto.errors import GradwireError, InternalError, RankLost
from gradwire_workers import segments
from gradwire_workers.frames import Encoded
from gradwire_workers.lifted_limits import AGAIN
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.rank_channel import Answer
from gradwire_workers.rank_standing import NUMBER
from gradwire_workers.step_rows import StepRow

_SECONDS_TO_FINISH = 1.0
# A rank that is through the last collective of a command has only its update before it.


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What each rank answered, in the order of ranks. `transfer`: seconds that no rank was at work.

    Of a command of which any answer will do there may be fewer than ranks.
    """

    fields: list[dict[str, Any]]
    transfer: float
    total: float


class Ranks:
    """See the module. `lost` is set for good once a rank is gone or the ranks are no longer equal."""

    def __init__(self, processes: Sequence[RankProcess]) -> None:
        self.processes = tuple(processes)
        self.lost: RankLost | None = None
        self.on_lost: Callable[[RankLost], None] | None = None
        self.applied = 0
        """Commands that have changed the model. Each rank counts the same, for itself."""
        self.again = False
        """Whether commands are carried out once more, which were taken under other limits."""
        self._generation = 0
        self._calls: list[asyncio.Future[Answer]] = []
        self._patience = 0.0
        for process in self.processes:
            process.channel.on_lost = self._lose

    def __len__(self) -> int:
        return len(self.processes)

    def next_generation(self) -> int:
        """A number that no process group of these ranks has had."""
        self._generation += 1
        return self._generation

    async def call(
        self, kind: str, fields: Sequence[Mapping[str, Any]], *, changes: bool = True, any_will_do: bool = False
    ) -> Answers:
        """Sends each rank its fields; waits for every rank. Fewer fields than ranks: the first ranks only.

        `changes`: whether the command changes the model. any_will_do: a rank that has carried it out has been told by
        all others what it takes, and answers what they do. Then the command is applied though others are lost before
        they answer: it is as if they were lost right after it, and `lost` is set.

        Raises the error that the others follow from. Unless `lost` is set now, the ranks are ready for the next
        command, and this one changed nothing; or everything, on every rank, where the error's outcome is "applied".
        """
        if self.lost is not None:
            raise self._lost_before()
        started = time.perf_counter()
        if changes:
            fields = [{**of_rank, NUMBER: self.applied + 1} for of_rank in fields]
        if self.again:
            fields = [{**of_rank, AGAIN: True} for of_rank in fields]
        answers, missing = await self._answers(kind, fields, patience=_SECONDS_TO_FINISH if any_will_do else 0.0)
        total = time.perf_counter() - started
        failed = [answer for answer in answers if answer.error is not None]
        done = [answer for answer in answers if answer.error is None]
        if done and (len(done) == len(fields) or (any_will_do and missing is not None)):
            self.applied += changes
            return Answers(
                fields=[answer.fields for answer in done],
                transfer=max(0.0, total - max(answer.busy for answer in done)),
                total=total,
            )
        segments.release(*(answer.fields for answer in answers))
        if missing is not None:
            self._lose(missing)
            raise missing
        raise await self._recover(kind, answers, failed, changes)

    def begin(
        self, kind: str, fields: Sequence[Encoded], take: Sequence[Callable[[list[StepRow]], None]]
    ) -> list[asyncio.Future[Answer]]:
        """Sends each rank its fields. `take`: what each rank answers bit by bit. More may be begun before it is over.

        Once a rank is lost, the others have a second to end. `end`, or `abandon`, must follow. Raises RankLost where a
        rank was lost before.
        """
        if self.lost is not None:
            raise self._lost_before()
        self._patience = _SECONDS_TO_FINISH
        each = zip(self.processes, fields, take, strict=True)
        calls = [process.call(kind, of_rank, its) for process, of_rank, its in each]
        self._calls = [*(call for call in self._calls if not call.done()), *calls]
        return calls

    async def end(self, kind: str, messages: Sequence[Sequence[asyncio.Future[Answer]]], *, even: bool) -> None:
        """All that was begun is over, in order, and nothing but the last message need have gone well: raises the error
        that a changing command of this kind has ended with, as `call` does where any rank's answer will do.

        even: whether all ranks had got equally far.
        """
        self._patience = 0.0
        calls = [call for message in messages for call in message]
        missing = next((error for call in calls if isinstance(error := call.exception(), RankLost)), None)
        if missing is not None:
            # A rank that has ended the last one well has ended them all.
            if any(call.exception() is None and _is_well(call.result()) for call in messages[-1]):
                return
            raise self.give_up(missing)
        answers = [[call.result() for call in message] for message in messages]
        first = next((index for index, its in enumerate(answers) if not all(map(_is_well, its))), None)
        if first is None:
            return
        # Behind one that failed, all are refused.
        if not even or any(_is_well(each) for its in answers[first:] for each in its):
            raise self.give_up(RankLost(f"a {kind} was applied on some ranks only", outcome="unknown"))
        raise await self._recover(kind, answers[first], answers[first], True)

    def abandon(self, kind: str) -> None:
        """Nobody knows what the ranks did, or when they are done."""
        self._patience = 0.0
        for call in self._calls:
            call.cancel()
        self._lose(RankLost(f"a {kind} was abandoned while it ran", outcome="unknown"))

    async def _answers(
        self, kind: str, fields: Sequence[Mapping[str, Any]], *, patience: float = 0.0
    ) -> tuple[list[Answer], RankLost | None]:
        """Every answer that came, and what became of a rank that gave none.

        patience: seconds that the others have to answer once a rank is lost.
        """
        self._patience = patience
        calls = [process.call(kind, of_rank) for process, of_rank in zip(self.processes, fields, strict=False)]
        self._calls = calls
        answers: list[Answer] = []
        missing: RankLost | None = None
        try:
            for call in calls:
                try:
                    answers.append(await call)
                except RankLost as lost:
                    missing = missing or lost
        except BaseException:
            self.abandon(kind)
            raise
        finally:
            self._patience = 0.0
        return answers, missing

    async def _recover(self, kind: str, answers: list[Answer], failed: list[Answer], changes: bool) -> GradwireError:
        """Makes the ranks ready for the next command, or gives them up. Returns the error to raise."""
        errors = [answer.error for answer in failed if answer.error is not None]
        cause = next((error for error in errors if error.reason != "PEER_FAILED"), None)
        applied = {answer.error is None or answer.error.outcome == "applied" for answer in answers}
        if cause is not None and not changes:
            cause.outcome = "not_applied"
        if cause is None:
            self._lose(RankLost(f"the ranks lost each other during a {kind}", outcome="unknown"))
        elif cause.reason == "UPDATE_TORN" or (changes and len(applied) > 1):
            self._lose(RankLost(f"a {kind} was applied on some ranks only: {cause.message}", outcome="unknown"))
        else:
            self.applied += changes and cause.outcome == "applied"
            if any(answer.needs_rejoin for answer in failed):
                await self.rejoin()
        if self.lost is not None:
            return self.lost
        return cause or InternalError(f"a {kind} failed")

    def give_up(self, lost: RankLost) -> RankLost:
        """The ranks are no longer equal, and no answer matters: they are lost. Returns the error of that."""
        self._patience = 0.0
        self._lose(lost)
        return self.lost or lost

    async def rejoin(self) -> None:
        """Have the ranks join each other again, or give them up."""
        generation = self.next_generation()
        answers, missing = await self._answers("rejoin", [{"generation": generation}] * len(self))
        error = missing or next((answer.error for answer in answers if answer.error is not None), None)
        if error is not None:
            self._lose(RankLost(f"the ranks could not join again: {error.message}", outcome="not_applied"))

    def _lose(self, lost: RankLost) -> None:
        if self.lost is None:
            self.lost = lost
            if self._patience:
                self._end_lost_processes()
                asyncio.get_running_loop().call_later(self._patience, _give_up, self._calls, lost)
            else:
                _give_up(self._calls, lost)
            if self.on_lost is not None:
                self.on_lost(lost)

    def _end_lost_processes(self) -> None:
        """One that is stopped must not keep the others waiting."""
        for process in self.processes:
            if process.channel.lost is not None:
                process.kill()

    def _lost_before(self) -> RankLost:
        """The same loss, told to a command that was never sent."""
        assert self.lost is not None
        return RankLost(self.lost.message, reason=self.lost.reason, outcome="not_applied")


def _is_well(answer: Answer) -> bool:
    return answer.error is None


def _give_up(calls: Sequence[asyncio.Future[Answer]], lost: RankLost) -> None:
    """The other ranks may be busy for a long time yet, and what they will say no longer matters."""
    for call in calls:
        if not call.done():
            call.set_exception(lost)
