"""Where models get their ranks: capacity, the warm pool and worker groups. All that the frontend sees."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from gradwire_proto.codec import encode_model_spec
from gradwire_proto.errors import GradwireError, RankLost
from gradwire_proto.values import (
    ArchitectureSpec,
    Batch,
    Limits,
    ModelSpec,
    ModelState,
    NamedTensors,
    StateTensor,
)
from gradwire_workers import segments
from gradwire_workers.function_rank import FunctionRank
from gradwire_workers.function_ranks import FunctionRanks
from gradwire_workers.group_state import for_rank
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.open_variants import OpenVariants
from gradwire_workers.owners_cluster import OwnersCluster
from gradwire_workers.patient_calls import within
from gradwire_workers.placement import Placement
from gradwire_workers.pool.capacity import Capacity, Demand
from gradwire_workers.pool.capacity_queue import CapacityQueue, Waiting
from gradwire_workers.pool.lease import Claim, Lease
from gradwire_workers.pool.rank_launcher import RankLauncher
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.pool.warm_pool import WarmPool
from gradwire_workers.ranks import Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.worker_group import WorkerGroup

_FRONTEND = "frontend"

_SECONDS_TO_JOIN = 30.0
"""How long Ray may take to let this process join."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Where to find Ray, and how to use it.

    address: Ray's own, "127.0.0.1:6379". namespace: this service's, the same after a restart.
    folder, memory_folder: private, the second in shared memory; the first one's path must be short, for sockets.
    workers: how many ranks models may hold, None for as many as Ray has CPUs. spare_ranks: warm ones kept ready.
    threads_per_rank: torch's threads, 0 for an equal share of the machine's cores.
    weights_folder: where architectures may find their first weights, None for nowhere.
    workers_per_owner: how many of them models of one owner may hold, None for all.
    kernels_folder: private, where ranks find and leave compiled kernels; None for nowhere, and none are compiled.
    """

    address: str
    namespace: str
    folder: str
    memory_folder: str
    workers: int | None = None
    spare_ranks: int = 2
    threads_per_rank: int = 0
    limits: Limits = field(default_factory=Limits)
    weights_folder: str | None = None
    kernels_folder: str | None = None
    workers_per_owner: int | None = None


class Cluster:
    """See the module. Made by `connect`; all methods belong to the event loop's thread."""

    def __init__(self, config: ClusterConfig, placement: Placement, launcher: RankLauncher) -> None:
        self._config = config
        self._placement = placement
        self._launcher = launcher
        self._writer = SegmentWriter(config.memory_folder, _FRONTEND)

    @classmethod
    async def connect(cls, config: ClusterConfig) -> Cluster:
        """Joins Ray, removes what an earlier frontend left, and starts warming ranks. Does not wait for them.

        Unavailable when Ray does not answer.
        """
        for folder in (config.folder, config.memory_folder):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        placement = Placement(config.address, config.namespace)
        launcher = RankLauncher(placement, folder=config.folder, memory_folder=config.memory_folder)
        cluster = cls(config, placement, launcher)
        await cluster._join()
        return cluster

    async def _join(self) -> None:
        in_thread = self._launcher.in_thread
        try:
            await within(_SECONDS_TO_JOIN, self._placement.join)
        except TimeoutError:
            raise self._placement.no_answer(f"not within {_SECONDS_TO_JOIN:g} s") from None
        await in_thread(self._placement.kill_orphans)
        self._sweep()
        cpus, gpus = await in_thread(self._placement.totals)
        self.capacity = Capacity(
            workers=self._config.workers or cpus, gpus=gpus, most_per_owner=self._config.workers_per_owner
        )
        self._queue = CapacityQueue(self.capacity)
        cores = len(os.sched_getaffinity(0))
        self._threads = self._config.threads_per_rank or max(1, cores // max(1, self.capacity.workers))
        self._pool = WarmPool[RankProcess](
            self._start_rank,
            spare=self._config.spare_ranks,
            # What models may hold, and the rank of functions: beside them the spares, for ranks that are lost.
            most=self.capacity.workers + 1 + self._config.spare_ranks,
            at_once=cores,
        )
        self._functions = FunctionRanks(self._function_rank)
        self._pool.open()

    def _sweep(self) -> None:
        segments.sweep(self._config.memory_folder, "rank")
        segments.sweep(self._config.memory_folder, _FRONTEND)
        shutil.rmtree(self._groups_folder, ignore_errors=True)

    @property
    def _groups_folder(self) -> Path:
        return Path(self._config.folder) / "groups"

    async def _start_rank(self) -> RankProcess:
        process = await self._launcher.start()
        self._watch_idle(process)
        return process

    def _watch_idle(self, process: RankProcess) -> None:
        process.channel.on_lost = lambda _: self._pool.remove(process)

    def _function_rank(self, owner: str) -> FunctionRank:
        async def take() -> RankProcess:
            (process,) = await self._pool.take(1, owner)
            return process

        return FunctionRank(
            take=take,
            give_up=partial(self._pool.give_back, reuse=False),
            writer=self._writer,
            device="cpu",
            threads=self._threads,
            limits=self._config.limits,
        )

    async def warm(self, ranks: int | None = None) -> None:
        """Waits until so many ranks are warm, or as many as are kept."""
        await self._pool.warm(ranks)

    async def start_group(
        self,
        spec: ModelSpec,
        tensors: NamedTensors,
        example: Batch | None,
        *,
        model_id: str = "",
        owner: str = "",
        state: ModelState | None = None,
        place: object = None,
        again: bool = False,
        wait_until: float | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> WorkerGroup:
        """Ranks that hold the model, ready for commands. Whatever fails, nothing is left behind.

        With `state`, `tensors` are its tensors, and the ranks go on from there, bit for bit; nothing is tried, and no
        example needed. Its segments stay the caller's.

        place: a group that was vacated. What it holds is taken, and given back to it should this fail: nobody else can
        have it meanwhile. again: the model was served before, maybe under other limits, which do not count; it comes
        before all that wait. wait_until: how long it may wait for its turn, on time.monotonic(), where the capacity is
        taken; None: not at all. tell: called with the words of what it waits for, and "" when it does no more.

        ResourceExhausted (WORKERS_EXHAUSTED, GPUS_EXHAUSTED) when the capacity is taken; FailedPrecondition
        (NO_GPUS, ROWS_NOT_INDEPENDENT); InvalidArgument where the program, the loss or the optimizer is wrong. RankLost
        where ranks are lost twice.
        """
        claim = None if again else partial(self._queue.claim, waiting=Waiting(until=wait_until, tell=tell))
        try:
            return await self._start_group(spec, tensors, example, model_id, owner, state, place, again, claim)
        except RankLost as lost:
            logger.warning("models/%s lost its ranks before it was made, and gets others: %s", model_id, lost)
        try:
            return await self._start_group(spec, tensors, example, model_id, owner, state, place, again, claim)
        except RankLost as lost:
            raise RankLost(lost.message, reason=lost.reason, outcome="not_applied") from lost

    async def _start_group(
        self,
        spec: ModelSpec,
        tensors: NamedTensors,
        example: Batch | None,
        model_id: str,
        owner: str,
        state: ModelState | None,
        place: object,
        again: bool,
        claim: Claim | None,
    ) -> WorkerGroup:
        demand = self.capacity.demand(spec, owner)
        lease = Lease(
            capacity=self.capacity,
            placement=self._placement,
            launcher=self._launcher,
            pool=self._pool,
            folder=self._groups_folder / f"{model_id}-{uuid.uuid4().hex[:8]}",
        )
        threads = self._threads if state is None else state.threads
        try:
            await lease.acquire(demand, place=_lease_of(place), claim=claim)
            ranks = Ranks(lease.processes)
            group = WorkerGroup(
                ranks=ranks,
                variants=self._variants(spec, ranks),
                device=demand.device,
                writer=self._writer,
                threads=threads,
                release=lease.release,
                compiles=spec.compile,
            )
            group.lease = lease
            with group.without_limits() if again else nullcontext():
                built = await self._load(ranks, lease, spec, demand, tensors, threads, state)
            if isinstance(spec.program, ArchitectureSpec):
                group.tensors = built
            if state is None:
                await group.prepare(example)
            else:
                await group.resume(state)
        except BaseException as error:
            # A program that is refused leaves good ranks behind.
            reuse = isinstance(error, GradwireError) and not isinstance(error, RankLost)
            await asyncio.shield(_give_up(lease, place, reuse))
            raise
        return group

    def _variants(self, spec: ModelSpec, ranks: Ranks) -> GroupVariants:
        if isinstance(spec.program, ArchitectureSpec):
            graphs, opening = (), OpenVariants(ranks, self._config.limits)
        else:
            graphs, opening = spec.program.variants, None
        return GroupVariants(
            ranks,
            graphs,
            opening=opening,
            loss_is_given=spec.loss_reduction is not None,
            require_sharding=spec.require_sharding,
        )

    async def _load(
        self,
        ranks: Ranks,
        lease: Lease,
        spec: ModelSpec,
        demand: Demand,
        tensors: NamedTensors,
        threads: int,
        state: ModelState | None,
    ) -> tuple[StateTensor, ...]:
        """Returns the tensors of an architecture, which only the ranks know."""
        common = {
            "spec": encode_model_spec(spec).SerializeToString(),
            "tensors": tensors,
            "device": demand.device,
            "size": len(ranks),
            "threads": threads,
            "limits": asdict(self._config.limits),
            "weights_folder": self._config.weights_folder,
            "kernels_folder": self._config.kernels_folder,
        }
        of_ranks = [
            {
                **common,
                "rank": rank,
                "gpus": lease.gpu_ids(rank),
                "saved": None if state is None else for_rank(state, rank, len(ranks)),
            }
            for rank in range(len(ranks))
        ]
        await ranks.call("load", of_ranks, changes=False)
        where = {"folder": str(lease.folder), "generation": ranks.next_generation()}
        answers = await ranks.call("start", [where] * len(ranks), changes=False)
        return tuple(
            StateTensor(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in answers.fields[0]["tensors"]
        )

    def check(self) -> None:
        """Whether Ray answers; for a thread that may wait for long. Raises Unavailable."""
        self._placement.check()

    def functions(self, owner: str) -> FunctionRank:
        """Where functions of this owner are computed, which no model holds. To be asked for each."""
        return self._functions.of(owner)

    def of(self, owner: str) -> OwnersCluster:
        """The cluster as one owner has it: ranks that serve nobody else."""
        return OwnersCluster(self, owner)

    async def close(self) -> None:
        """Ends every rank and leaves Ray. Groups that are still open are lost."""
        await self._functions.close()
        await self._pool.close()
        await self._launcher.close()
        self._sweep()


def _lease_of(place: object) -> Lease | None:
    """What a group still holds whose ranks were vacated."""
    return place.lease if isinstance(place, WorkerGroup) and not place.is_closed else None


async def _give_up(lease: Lease, place: object, reuse: bool) -> None:
    """Give back what was taken: to the group that keeps the place, or to everybody."""
    await lease.vacate(reuse)
    if (keeper := _lease_of(place)) is not None:
        lease.hand_over(keeper)
    await lease.release(reuse)
