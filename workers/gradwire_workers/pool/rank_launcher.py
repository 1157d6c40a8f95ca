"""Starts rank processes, connects to them, and ends them so that nothing of theirs is left."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import zmq

from gradwire_proto.errors import Unavailable
from gradwire_workers import segments
from gradwire_workers.placement import Placement
from gradwire_workers.pool.rank_process import ProcessHandle, RankProcess
from gradwire_workers.rank_channel import RankChannel

ResultT = TypeVar("ResultT")

# How long a rank waits for its frontend, and a frontend for its rank. Starting takes seconds, more on a busy machine.
_PATIENCE_SECONDS = 90.0
_HELLO_SECONDS = 15.0
# How long Ray may take to end a rank, before it is ended without Ray, which may be dead itself.
_RAY_SECONDS = 2.0


class RankLauncher:
    """See the module. `folder`: private, with a short path; sockets live there until they are connected."""

    def __init__(self, placement: Placement, *, folder: str, memory_folder: str) -> None:
        self._placement = placement
        self._folder = folder
        self._memory_folder = memory_folder
        self._context = zmq.Context()
        self._processes: set[RankProcess] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(max_workers=16, thread_name_prefix="gradwire-ray")

    async def in_thread(self, function: Callable[..., ResultT], *arguments: Any, **options: Any) -> ResultT:
        """Calls a function that blocks on Ray."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *arguments, **options))

    async def start(self) -> RankProcess:
        """A new rank, warm and connected. Unavailable when it does not come up."""
        name = f"rank-{uuid.uuid4().hex[:12]}"
        started = await self.in_thread(
            self._placement.start_rank, name, self._folder, self._memory_folder, patience=_PATIENCE_SECONDS
        )
        channel = RankChannel(self._context, started["endpoint"], name)
        handle = ProcessHandle(started["process_id"])
        process = RankProcess(channel, process_id=started["process_id"], end=partial(self._end, handle))
        self._processes.add(process)
        try:
            await asyncio.wait_for(channel.call("hello"), _HELLO_SECONDS)
        except BaseException as error:
            process.kill()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"{name} started but does not answer", reason="RANK_NOT_STARTED") from error
            raise
        # Connected: nobody else needs to find it.
        Path(started["endpoint"].removeprefix("ipc://")).unlink(missing_ok=True)
        return process

    async def in_thread_briefly(self, function: Callable[..., Any], *arguments: Any) -> bool:
        """Calls a function that blocks on Ray, and goes on without it where Ray does not answer: then False."""
        calling = asyncio.ensure_future(self.in_thread(function, *arguments))
        calling.add_done_callback(_forget_failure)
        done, _ = await asyncio.wait({calling}, timeout=_RAY_SECONDS)
        return bool(done)

    def _end(self, handle: ProcessHandle, process: RankProcess) -> asyncio.Task[None]:
        self._processes.discard(process)
        if process.channel.lost is not None:
            # Dead, or stopped: it must not wake up, and peers that wait for it should know.
            handle.kill()
        ending = asyncio.create_task(self._end_process(handle, process))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        return ending

    async def _end_process(self, handle: ProcessHandle, process: RankProcess) -> None:
        # Ray first: a rank that leaves because its connection ended looks like a crash to Ray, which would say so.
        if await self.in_thread_briefly(self._placement.kill, process.name):
            await handle.gone(timeout=_RAY_SECONDS)
        handle.kill()
        process.channel.close()
        await handle.gone(timeout=5.0)
        handle.close()
        segments.sweep(self._memory_folder, process.name)

    async def close(self) -> None:
        """Ends every rank of the namespace, those that are just starting included, and leaves Ray."""
        for process in list(self._processes):
            process.kill()
        await asyncio.gather(*self._endings, return_exceptions=True)
        await self.in_thread(self._placement.kill_orphans)
        await asyncio.to_thread(self._threads.shutdown, wait=True)
        # One that was starting may have appeared meanwhile.
        await asyncio.to_thread(self._placement.kill_orphans)
        await asyncio.to_thread(self._placement.leave)
        for pattern in ("rank-*.sock", "rank-*.seq"):
            for path in Path(self._folder).glob(pattern):
                path.unlink(missing_ok=True)
        segments.sweep(self._memory_folder, "rank")
        self._context.destroy(linger=0)


def _forget_failure(call: asyncio.Future[Any]) -> None:
    """Nobody waits for the call any more, or nobody needs what it gives."""
    if not call.cancelled():
        call.exception()
