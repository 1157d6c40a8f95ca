"""The commands of one model that a client's own autograd gives: forwards retained, and gone back through."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.values import (
    BackwardQuery,
    BackwardResult,
    ForwardResult,
    Limits,
    NamedTensors,
    Retention,
    TensorData,
    Value,
)
from gradwire_server.calls import Call
from gradwire_server.replies import inline_bytes
from gradwire_server.retained_forwards import RetainedForwards
from gradwire_server.tensors.downloads import Downloads
from gradwire_server.workers import RetainedWorkers


@dataclass(frozen=True, slots=True, kw_only=True)
class Turns:
    """How requests of the model take turns: HostedModel's own ways.

    command(call, tensors, work, deliver=None) and read(call, tensors, work) wait for the end; begin, which takes what
    read does, does not. weigh(call, nbytes): what a reply holds in memory.
    """

    command: Callable[..., Awaitable[Any]]
    read: Callable[..., Awaitable[Any]]
    begin: Callable[..., Any]
    weigh: Callable[[Call, int], None]


class AutogradCommands:
    """See the module. `workers`: the model's ranks, as they are now. `model`: what no other model is known by.

    A retained forward is named after its model and its number: ranks to which it is applied once more retain it under
    the same name. What lets go of one is no command of its own; the journal has it with the next one.
    """

    def __init__(
        self,
        turns: Turns,
        workers: Callable[[], RetainedWorkers],
        downloads: Downloads,
        limits: Limits,
        model: Callable[[], str],
    ) -> None:
        self._turns = turns
        self._workers = workers
        self._downloads = downloads
        self._model = model
        self._retained = RetainedForwards(limits, self._begin_release)
        self._released: list[str] = []

    async def forward(
        self,
        inputs: Value,
        retention: Retention,
        training: bool,
        seed: int | None,
        max_inline_bytes: int | None,
        call: Call,
    ) -> ForwardResult:
        """The outputs for some inputs, retained for `backward`. With `training`, buffers move."""

        async def work(values: Any, number: int) -> ForwardResult:
            self._retained.forget(retention.release)
            try:
                if call.replay is None:
                    # What had expired by then is let go of by a later record.
                    self._retained.check_room()
                name = hashlib.sha256(f"{self._model()}/{number}".encode()).hexdigest()[:32]
                result = await self._workers().forward(
                    values["inputs"], retention, name, training=training, seed=seed, command=number
                )
            except BaseException:
                if retention.release:
                    # The ranks may not have heard of them.
                    self._begin_release(retention.release)
                raise
            if result.retained is not None:
                self._retained.keep(name)
            return result

        async def deliver(result: ForwardResult) -> ForwardResult:
            outputs = await self._downloads.deliver(result.outputs, max_inline_bytes)
            self._turns.weigh(call, inline_bytes(outputs))
            return replace(result, outputs=outputs)

        return await self._turns.command(call, {"inputs": inputs}, work, deliver)

    async def backward(
        self,
        query: BackwardQuery,
        cotangents: Sequence[TensorData | None],
        max_inline_bytes: int | None,
        call: Call,
    ) -> BackwardResult:
        """Add a retained forward's gradients to those that are held."""

        async def work(values: Any, _: int) -> BackwardResult:
            if call.replay is None:
                # A replay may take longer than forwards are retained; the ranks know what they have.
                self._retained.check(query.retained)
            result = await self._workers().backward(query, values["cotangents"])
            if query.keep:
                self._retained.keep(query.retained)
            else:
                self._retained.forget((query.retained,))
            return result

        async def deliver(result: BackwardResult) -> BackwardResult:
            gradients = await self._downloads.deliver(result.input_gradients, max_inline_bytes)
            self._turns.weigh(call, inline_bytes(gradients))
            return replace(result, input_gradients=gradients)

        return await self._turns.command(call, {"cotangents": list(cotangents)}, work, deliver)

    async def release(self, names: tuple[str, ...], call: Call) -> None:
        """Let go of retained forwards. Names of none are passed over."""
        await self._turns.read(call, None, self._release(names))

    async def held_gradients(
        self, wrt: tuple[str, ...] | None, max_inline_bytes: int | None, call: Call
    ) -> tuple[NamedTensors, int]:
        """(held gradients by name, step)."""

        async def work(_: Any) -> tuple[NamedTensors, int]:
            gradients, step = await self._workers().held_gradients(wrt)
            return await self._downloads.deliver(gradients, max_inline_bytes), step

        return await self._turns.read(call, None, work)

    async def set_gradients(self, gradients: NamedTensors, dropped: tuple[str, ...], call: Call) -> int:
        """Replace held gradients, and drop others; returns the step."""
        return await self._turns.command(
            call,
            {"gradients": gradients},
            lambda values, _: self._workers().set_gradients(values["gradients"], dropped),
        )

    def settings_changed(self) -> None:
        """Forget what is retained, as the ranks have: it was for what was trained before."""
        self._retained.close()

    def take_released(self) -> tuple[str, ...]:
        """Which forwards were let go of since this was called last."""
        released, self._released = tuple(self._released), []
        return released

    async def release_again(self, names: Sequence[str] | None = None) -> None:
        """Let go of forwards on ranks to which commands are applied once more; None: of those not yet taken."""
        names = tuple(self._released) if names is None else names
        if names:
            self._retained.forget(names)
            await self._workers().release(names)

    async def release_all(self) -> None:
        """Let go of every forward, in a turn: a checkpoint without them takes the place of the journal."""
        names = self._retained.names
        self._retained.close()
        if names:
            await self._workers().release(names)

    def goes_back(self) -> None:
        """Forget what is retained: commands are applied once more, and retain it again."""
        self._retained.close()

    def close(self) -> None:
        """Forget everything: the ranks go."""
        self._retained.close()

    def _release(self, names: tuple[str, ...]) -> Callable[[Any], Awaitable[None]]:
        async def work(_: Any) -> None:
            self._retained.forget(names)
            await self._workers().release(names)
            self._released.extend(names)

        return work

    def _begin_release(self, names: tuple[str, ...]) -> None:
        """Release what has expired, when its turn comes."""
        try:
            self._turns.begin(Call(), None, self._release(names))
        except FailedPrecondition:
            # The model is on its way out, and its ranks' memory with it.
            return
        except GradwireError:
            # The queue is full: it stays for as long again.
            for name in names:
                self._retained.keep(name)
