"""Training steps that the ranks of a model are handed together, in one message after another."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence

from gradwire_proto.batch_form import FormedStep
from gradwire_proto.values import StepResult
from gradwire_workers.packed_steps import Layout, pack_steps
from gradwire_workers.ranks import Ranks
from gradwire_workers.step_dispatch import StepDispatch
from gradwire_workers.step_memory import Region, StepMemory
from gradwire_workers.step_rows import StepRow, step_result


class StepFlow:
    """Made by `WorkerGroup.step_flow`. From its first `send` until `ended` returns, the group takes no other call.

    layouts_of: those of the first of some steps that can go together. `took` is called with the results of steps that
    are applied, in order, as they come; it may send more. Where ranks are lost, what one rank has carried out is
    applied, as in `train_step`.
    """

    def __init__(
        self,
        ranks: Ranks,
        layouts_of: Callable[[Sequence[FormedStep]], list[Layout]],
        took: Callable[[list[StepResult]], None],
        came: Callable[[Layout, int], None] | None = None,
        memory: StepMemory | None = None,
    ) -> None:
        self._memory = memory
        self._regions: deque[tuple[int, list[Region]]] = deque()
        """Of each message that is not answered: its last step's number, and where its batches lie."""
        self._sent = self._told = 0
        """Steps."""
        self._ranks = ranks
        self._came = came
        self._layouts_of = layouts_of
        self._layouts: deque[Layout] = deque()
        self._took = took
        self._dispatch = StepDispatch(ranks, self._applied)

    @property
    def has_room(self) -> bool:
        """Whether more steps should be sent now: the ranks are about to be through with those that they have."""
        return self._dispatch.has_room

    def send(self, steps: Sequence[FormedStep], *, command: int) -> None:
        """Hand the ranks steps that can go together, behind those that they have, numbered from `command` on.

        Raises RankLost, outcome "not_applied", where a rank was lost before.
        """
        layouts, number = self._layouts_of(steps), self._ranks.applied + self._dispatch.unanswered + 1
        follows = self._dispatch.is_under_way
        packed = [
            pack_steps(steps, layouts, rank=rank, command=command, number=number, follows=follows, memory=self._memory)
            for rank in range(len(self._ranks))
        ]
        self._sent += len(steps)
        self._regions.append((self._sent, [region for _, region in packed if region is not None]))
        self._dispatch.send([fields for fields, _ in packed], len(steps))
        self._layouts.extend(layouts)

    async def ended(self) -> None:
        """Return when all steps are applied. Raises the error of the first that is not; those behind it were not."""
        try:
            await self._dispatch.ended()
        finally:
            # Where ranks are lost, whatever they still read is of no use.
            self._free(self._sent)

    def _applied(self, steps: Sequence[Sequence[StepRow]], idle: float) -> None:
        layouts = [self._layouts.popleft() for _ in steps]
        self._told += len(steps)
        self._free(self._told)
        self._took([self._result(of_ranks, layout, idle) for of_ranks, layout in zip(steps, layouts, strict=True)])
        if self._came is not None:
            for layout, count in Counter(layouts).items():
                self._came(layout, count)

    def _free(self, told: int) -> None:
        """The ranks have told of so many steps."""
        while self._regions and self._regions[0][0] <= told:
            for region in self._regions.popleft()[1]:
                assert self._memory is not None, "it has placed them"
                self._memory.free(region)

    def _result(self, of_ranks: Sequence[StepRow], layout: Layout, idle: float) -> StepResult:
        return step_result(of_ranks, layout.rows, rank_rows=layout.rank_rows, transfer=idle)
