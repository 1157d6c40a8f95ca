"""Derivatives of functions that no model holds: one warm rank computes them, and remembers the last ones by digest."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from gradwire_proto.batch_check import select_variant
from gradwire_proto.codec import encode_program
from gradwire_proto.errors import FailedPrecondition, InvalidArgument, RankLost
from gradwire_proto.function_digest import function_digest
from gradwire_proto.values import (
    Batch,
    DerivativeQuery,
    DerivativeResult,
    FunctionSpec,
    GradientQuery,
    GradientResult,
    Limits,
    TensorData,
    Variant,
)
from gradwire_workers import segments
from gradwire_workers.combining import derivative_result, gradient_result
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.ranks import Answers, Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard, shard_fields
from gradwire_workers.sharding import examples_in, split

logger = logging.getLogger(__name__)

_REMEMBERED_FUNCTIONS = 64
_REMEMBERED_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A function that the rank has built. `nbytes`: what its constants take."""

    variants: tuple[Variant, ...]
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class _Sent:
    """A function that came with its program, whose digest is as computed here. `program`: its message's bytes."""

    digest: str
    program: bytes
    described: _Known


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What the rank has answered, and to what."""

    answers: Answers
    variant: Variant
    shard: Shard
    rows: int


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
        self._calls = 0

    @property
    def is_busy(self) -> bool:
        """Whether a function is computed, or waits to be."""
        return self._calls > 0

    async def compute_gradients(self, function: FunctionSpec, batch: Batch, query: GradientQuery) -> GradientResult:
        """The function's value, gradients and outputs. One function at a time.

        A call that is cancelled while its function is computed ends the rank: a function may take for ever, and has no
        state that could be lost.

        FailedPrecondition (FUNCTION_UNKNOWN) when only a digest came and the rank does not know it (any more);
        InvalidArgument (DIGEST_MISMATCH) when the digest is not that of what came with it.
        """
        extra = {"query": asdict(query), "command": 0}
        async with self._computed("compute_function", function, batch, extra, query.training) as done:
            return await gradient_result(done.answers, done.variant, [done.shard], done.rows, self._writer)

    async def differentiate(
        self, function: FunctionSpec, batch: Batch, query: DerivativeQuery, vectors: Sequence[TensorData]
    ) -> DerivativeResult:
        """Another derivative of the function, and its outputs. As for gradients."""
        extra = {"query": asdict(query), "vectors": list(vectors)}
        async with self._computed("differentiate_function", function, batch, extra, False) as done:
            return derivative_result(done.answers, done.variant)

    async def close(self) -> None:
        """Gives the rank up, whatever it is computing."""
        self.drop()

    @asynccontextmanager
    async def _computed(
        self, kind: str, function: FunctionSpec, batch: Batch, extra: Mapping[str, Any], training: bool
    ) -> AsyncIterator[_Done]:
        """What the rank answers to a command about the function. Inside, no other command runs."""
        self._calls += 1
        try:
            sent = None if function.program is None else await asyncio.to_thread(_prepare, function)
            async with self._turn:
                try:
                    done = await self._compute(kind, function, sent, batch, extra, training)
                except RankLost as lost:
                    logger.warning("the rank of functions was lost, and another takes its place: %s", lost)
                    done = await self._compute(kind, function, sent, batch, extra, training)
                yield done
        finally:
            self._calls -= 1

    async def _compute(
        self,
        kind: str,
        function: FunctionSpec,
        sent: _Sent | None,
        batch: Batch,
        extra: Mapping[str, Any],
        training: bool,
    ) -> _Done:
        # First: what was known goes with the rank that knew it.
        ranks = await self._living_ranks()
        digest = function.digest if sent is None else sent.digest
        known = self._known.get(digest)
        chosen = known or (sent and sent.described)
        if chosen is None:
            raise FailedPrecondition(
                "this function is not known: send its program", reason="FUNCTION_UNKNOWN", field="function.digest"
            )
        variant, rows = select_variant(chosen.variants, batch, training=training, targets=False)
        rows = rows or examples_in(batch)
        (shard,) = split(variant, rows, batch, ranks=1, whole=True)
        fields: dict[str, Any] = {
            "digest": digest,
            "forget": self._make_room(chosen) if known is None else [],
            "shard": shard_fields(shard),
            **extra,
            **self._settings,
        }
        if known is None and sent is not None:
            fields["program"] = sent.program
            fields["tensors"] = function.tensors
            fields["output_leaf"] = function.output_leaf
        try:
            answers = await ranks.call(kind, [fields], changes=False)
        except asyncio.CancelledError:
            self.drop()
            raise
        except RankLost as lost:
            self.drop()
            # A function changes nothing: what was lost can be asked for again.
            raise RankLost(lost.message, reason=lost.reason) from lost
        self._known[digest] = chosen
        self._known.move_to_end(digest)
        return _Done(answers=answers, variant=variant, shard=shard, rows=rows)

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
            self.drop()
        if self._ranks is None:
            self._ranks = Ranks([await self._take()])
        return self._ranks

    def drop(self) -> None:
        """Gives the rank up, and forgets what it knew."""
        self._known.clear()
        if self._ranks is not None:
            self._give_up(self._ranks.processes[0])
            self._ranks = None


def _prepare(function: FunctionSpec) -> _Sent:
    """For a thread: it reads every byte of the function."""
    assert function.program is not None
    digest = function_digest(function.program, function.tensors, function.output_leaf, pieces=segments.pieces)
    if function.digest not in ("", digest):
        raise InvalidArgument(
            f"expected {digest}, which is the digest of this program and its tensors; got {function.digest[:80]}",
            field="function.digest",
            reason="DIGEST_MISMATCH",
        )
    return _Sent(
        digest=digest,
        program=encode_program(function.program).SerializeToString(),
        described=_Known(
            variants=function.program.variants, nbytes=sum(tensor.nbytes for tensor in function.tensors.values())
        ),
    )
