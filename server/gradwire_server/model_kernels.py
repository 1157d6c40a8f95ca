"""Compiled kernels of one model: watched while they are compiled, and taken into use by a command of its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import BatchShapes
from gradwire_server.calls import Call
from gradwire_server.commands import Commands
from gradwire_server.fingerprints import fingerprint
from gradwire_server.kernel_records import SWAP_KERNELS, decode_swap, encode_swap
from gradwire_server.model_description import ModelDescription
from gradwire_server.workers import Workers

PAUSE = 0.25
"""Seconds between two looks at what is compiled."""

logger = logging.getLogger(__name__)


class ModelKernels:
    """See the module. `workers` gives the model's ranks, as they are now.

    Ranks are asked in turns like those of other requests, and only after commands, or while something is compiled.
    """

    def __init__(
        self,
        description: ModelDescription,
        commands: Commands,
        workers: Callable[[], Workers],
    ) -> None:
        self._description = description
        self._commands = commands
        self._workers = workers
        self._refused: dict[BatchShapes, str] = {}
        """Shapes for which no kernels are to be had again, and why."""
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Look after kernels from now on, where the model wants any."""
        if self._description.info.compile and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        """Begin nothing more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def apply(self, call: Call) -> None:
        """Take the kernels of the record in `call` into use: from this command on, such steps run on them."""
        shapes = decode_swap(call.raw)

        async def work(_: object, __: int) -> None:
            kernels = self._workers().kernels
            await kernels.use(shapes, again=call.replay is not None)
            self._description.compiled(kernels.told)

        await self._commands.run(call, None, work)

    async def _watch(self) -> None:
        seen = -1
        while True:
            await asyncio.sleep(PAUSE)
            info = self._description.info
            if info.state != "ready":
                seen = -1
                continue
            number = self._commands.number
            if number == seen and not any(each.state == "compiling" for each in info.compiled):
                continue
            try:
                ready = await self._look()
                # Of one command more there is something to see.
                seen = number if ready is None else -1
                if ready is not None:
                    await self._swap(ready)
            except GradwireError as error:
                logger.info("models/%s: its kernels wait: %s", info.id, error)
                seen = -1

    async def _look(self) -> BatchShapes | None:
        """The shape whose kernels are ready, if any is."""
        looked_at: list[BatchShapes] = []

        async def look(_: object) -> BatchShapes | None:
            kernels = self._workers().kernels
            looked_at[:] = [each.batches for each in kernels.told if each.state == "compiling"]
            ready = await kernels.advance(self._refused)
            self._description.compiled(kernels.told)
            return ready

        try:
            return await self._commands.begin(Call(), None, look).result(None)
        except GradwireError as error:
            if error.reason == "COMMAND_KILLS_RANKS":
                # It was tried twice, the second time by new ranks.
                self._refused.update(dict.fromkeys(looked_at, "comparing them ended the ranks' processes"))
            raise

    async def _swap(self, shapes: BatchShapes) -> None:
        raw = encode_swap(shapes, self._description.info.id)
        try:
            await self.apply(Call(method=SWAP_KERNELS, raw=raw, body=fingerprint(SWAP_KERNELS, raw)))
        except GradwireError as error:
            if error.outcome == "not_applied" and not error.retryable:
                self._refused[shapes] = str(error)
            raise
