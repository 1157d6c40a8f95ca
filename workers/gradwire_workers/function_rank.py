"""Gradients of functions that no model holds: one warm rank computes them, and remembers the last ones by digest."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from gradwire_proto.batch_check import select_variant
from gradwire_proto.codec import encode_program
from gradwire_proto.errors import FailedPrecondition, RankLost
from gradwire_proto.values import Batch, FunctionSpec, GradientQuery, GradientResult, Limits, Variant
from gradwire_workers import segments
from gradwire_workers.combining import gradient_result
from gradwire_workers.rank_process import RankProcess
from gradwire_workers.ranks import Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.sharding import split
from gradwire_workers.worker_group import examples_in, shard_fields

_REMEMBERED_FUNCTIONS = 64
_REMEMBERED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A function that the rank has built. `nbytes`: what its constants take."""

    variants: tuple[Variant, ...]
    nbytes: int


class FunctionRank:
    """See the module. Takes its rank when the first function comes, and another when that one is lost."""

    def __init__(
        self,
        *,
        take: Callable[[], Awaitable[RankProcess]],
        give_up: Callable[[RankProcess], object],
        writer: SegmentWriter,
        device: str,
        threads: int,
        limits: Limits,
    ) -> None:
        self._take = take
        self._give_up = give_up
        self._writer = writer
        self._settings = {"device": device, "threads": threads, "limits": asdict(limits)}
        self._turn = asyncio.Lock()
        self._ranks: Ranks | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()

    async def compute_gradients(self, function: FunctionSpec, batch: Batch, query: GradientQuery) -> GradientResult:
        """The function's value, gradients and outputs. One function at a time.

        FailedPrecondition (FUNCTION_UNKNOWN) when only a digest came and the rank does not know it (any more).
        """
        await self._turn.acquire()
        computing = asyncio.create_task(self._compute(function, batch, query))
        computing.add_done_callback(lambda _: self._turn.release())
        try:
            # The rank finishes what it has begun, whether or not the caller still waits.
            return await asyncio.shield(computing)
        except asyncio.CancelledError:
            computing.add_done_callback(_drop)
            raise

    async def close(self) -> None:
        """Waits for the function that is being computed, and gives the rank up."""
        async with self._turn:
            self._drop_rank()

    async def _compute(self, function: FunctionSpec, batch: Batch, query: GradientQuery) -> GradientResult:
        # First: what was known goes with the rank that knew it.
        ranks = await self._living_ranks()
        known = self._known.get(function.digest)
        if known is None and function.program is None:
            raise FailedPrecondition(
                "this function is not known: send its program", reason="FUNCTION_UNKNOWN", field="function.digest"
            )
        chosen = known or _describe(function)
        variant, rows = select_variant(chosen.variants, batch, training=query.training, targets=False)
        rows = rows or examples_in(batch)
        (shard,) = split(variant, rows, batch, ranks=1, whole=True)
        fields: dict[str, Any] = {
            "digest": function.digest,
            "forget": self._make_room(chosen) if known is None else [],
            "shard": shard_fields(shard),
            "query": asdict(query),
            "command": 0,
            **self._settings,
        }
        if known is None and function.program is not None:
            fields["program"] = encode_program(function.program).SerializeToString()
            fields["tensors"] = function.tensors
            fields["output_leaf"] = function.output_leaf
        try:
            answers = await ranks.call("compute_function", [fields], changes=False)
        except RankLost as lost:
            self._drop_rank()
            # A function changes nothing: what was lost can be asked for again.
            raise RankLost(lost.message, reason=lost.reason) from lost
        self._known[function.digest] = chosen
        self._known.move_to_end(function.digest)
        return await gradient_result(answers, variant, [shard], rows, self._writer)

    def _make_room(self, coming: _Known) -> list[str]:
        """Forgets the functions that were used longest ago. Returns their digests: the rank forgets them too."""
        forgotten = []
        nbytes = coming.nbytes + sum(known.nbytes for known in self._known.values())
        while self._known and (nbytes > _REMEMBERED_BYTES or len(self._known) >= _REMEMBERED_FUNCTIONS):
            digest, oldest = self._known.popitem(last=False)
            nbytes -= oldest.nbytes
            forgotten.append(digest)
        return forgotten

    async def _living_ranks(self) -> Ranks:
        if self._ranks is not None and self._ranks.lost is not None:
            self._drop_rank()
        if self._ranks is None:
            self._ranks = Ranks([await self._take()])
        return self._ranks

    def _drop_rank(self) -> None:
        self._known.clear()
        if self._ranks is not None:
            self._give_up(self._ranks.processes[0])
            self._ranks = None


def _describe(function: FunctionSpec) -> _Known:
    assert function.program is not None
    return _Known(variants=function.program.variants, nbytes=sum(tensor.nbytes for tensor in function.tensors.values()))


def _drop(computing: asyncio.Task[GradientResult]) -> None:
    if not computing.cancelled() and computing.exception() is None:
        result = computing.result()
        segments.release(dict(result.gradients), result.input_gradients, result.outputs)
