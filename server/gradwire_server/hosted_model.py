"""One model's commands, each once and in order."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from gradwire_proto.errors import GradwireError
from gradwire_proto.names import command_name
from gradwire_proto.values import (
    Batch,
    CommandInfo,
    ForwardResult,
    GradientQuery,
    GradientResult,
    Limits,
    ModelInfo,
    ModelUpdate,
    NamedTensors,
    StateTensor,
    StepResult,
    Value,
    Variant,
)
from gradwire_server.autograd_commands import AutogradCommands, Turns
from gradwire_server.calls import Call
from gradwire_server.failures import public_error
from gradwire_server.model_description import ModelDescription, deleted
from gradwire_server.program_checks import check_new_variant, check_variant_fits
from gradwire_server.replies import deliver_gradients, deliver_outputs, inline_bytes
from gradwire_server.request_log import RequestLog, command_info
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.work_queue import Job, WorkQueue
from gradwire_server.workers import Workers

T = TypeVar("T")


class HostedModel:
    """A model and its ranks. Commands and reads run one at a time in the order in which they came.

    A command that gives a request id runs once: a repeat waits for it, or gets its reply. One that nobody waits for any
    more when its turn comes is not applied; one that was begun ends, whoever waits. Ranks that are lost are replaced.
    """

    def __init__(self, description: ModelDescription, hosting: Hosting) -> None:
        self.description = description
        self._hosting = hosting
        self._queue = WorkQueue(hosting.tensors.uploads, hosting.limits.requests_per_model)
        # What waits or runs is never forgotten, however few replies are to be stored.
        capacity = max(hosting.stored_replies, hosting.limits.requests_per_model)
        log: RequestLog[Job[Any]] = RequestLog(capacity, hosting.limits.message_bytes)
        self._ranks = LiveRanks(self._regain, self._ranks_lost)
        self._records = ModelRecords(self._save_now, self._in_turn)
        self._commands = Commands(
            description,
            self._queue,
            log,
            self._ranks,
            self._records,
            released=lambda: self.autograd.take_released(),
            applied=lambda: None,
        )
        self._there = asyncio.Event()
        self._restorer: Restorer | None = None
        self._restoring: asyncio.Task[None] | None = None
        turns = Turns(
            command=self._commands.run, read=self._commands.read, begin=self._commands.begin, weigh=log.weigh
        )
        self.autograd = AutogradCommands(
            turns,
            lambda: self._ranks.workers.retained,
            hosting.tensors.downloads,
            hosting.limits,
            f"{self.id}/{description.info.created_at}",
        )
        """What clients need whose own autograd goes through the model."""

    @property
    def id(self) -> str:
        """The last segment of its name."""
        return self.description.info.id

    # --- commands -------------------------------------------------------------------------------------------------

    async def train_step(self, batch: Batch, lr: float | None, call: Call) -> StepResult:
        """Forward, backward and update."""
        return await self._command(
            call,
            _tree(batch),
            lambda values, number: self._workers.train_step(_batch(values), command=number, lr=lr),
        )

    async def forward_backward(self, batch: Batch, call: Call) -> StepResult:
        """Add the gradients of a batch to those that are held."""
        return await self._command(
            call,
            _tree(batch),
            lambda values, number: self._workers.forward_backward(_batch(values), command=number),
        )

    async def optimizer_step(
        self,
        gradients: NamedTensors | None,
        lr: float | None,
        groups: tuple[Mapping[str, Value], ...],
        call: Call,
    ) -> StepResult:
        """Apply `gradients`, or those that are held where None. groups: options that the groups take, and keep."""
        return await self._command(
            call,
            {"gradients": gradients},
            lambda values, _: self._workers.optimizer_step(values["gradients"], lr=lr, groups=groups),
        )

    async def zero_grad(self, call: Call) -> None:
        """Drop the held gradients."""
        await self._command(call, None, lambda _, __: self._workers.zero_grad())

    async def load_state_dict(self, tensors: NamedTensors, partial: bool, call: Call) -> int:
        """Replace parameters and buffers; returns the step."""
        return await self._command(
            call,
            {"tensors": tensors},
            lambda values, _: self._workers.load_state_dict(values["tensors"], partial=partial),
        )

    async def load_optimizer_state(self, state: Value, call: Call) -> int:
        """Replace the state of the optimizer and its schedule; returns the step."""
        return await self._command(
            call,
            {"state": state},
            lambda values, _: self._workers.load_optimizer_state(values["state"]),
        )

    async def update(self, update: ModelUpdate, call: Call) -> ModelInfo:
        """Change settings, all of them or none; returns the model as it is after that."""

        async def work(_: Any, __: int) -> ModelInfo:
            trained = None
            if update.concerns_ranks:
                trained = await self._workers.update(update)
                self.autograd.settings_changed()
            self.description.updated(update, trained)
            return self.description.info

        return await self._command(call, None, work)

    async def add_variant(
        self,
        variant: Variant,
        tensors: tuple[StateTensor, ...],
        values: NamedTensors,
        operators: Mapping[str, str],
        example: Batch | None,
        call: Call,
    ) -> None:
        """Add a graph, and constants that it alone uses."""
        known = self.description
        # Not of a repeat: its variant is there already.
        if self._commands.find(call) is None:
            await asyncio.to_thread(
                check_new_variant, known.info, known.operators, variant, tensors, operators, values, self._limits
            )

        async def work(claimed: Any, _: int) -> None:
            # Again: others may have added variants meanwhile.
            check_variant_fits(known.info, variant, self._limits)
            await self._workers.add_variant(
                variant,
                tensors=tensors,
                values=claimed["values"],
                operators=operators,
                example=Batch(**claimed["example"]) if example is not None else None,
            )
            known.add_variant(variant, tensors, operators)

        example_tree = _tree(example)["batch"] if example is not None else None
        await self._command(call, {"values": values, "example": example_tree}, work)

    async def command(self, request_id: str, *, wait: bool) -> CommandInfo:
        """What became of the command with that request id; with `wait`, once it has ended.

        Raises ModelNotFound COMMAND_NOT_FOUND; the command's own error where nobody knows what became of it.
        """
        name = command_name(self.description.info.id, request_id)
        return await command_info(name, self._commands.get(request_id), wait=wait)

    # --- reads, which see the model between two commands; and forward, which is either ----------------------------

    async def compute_gradients(
        self,
        batch: Batch,
        query: GradientQuery,
        vectors: NamedTensors | None,
        max_inline_bytes: int | None,
        call: Call,
    ) -> GradientResult:
        """Loss, gradients and outputs of a batch, or the Hessian times `vectors`; nothing changes."""

        async def work(values: Any) -> GradientResult:
            result = await self._workers.compute_gradients(_batch(values), query, values["vectors"])
            return await deliver_gradients(result, self._tensors.downloads, max_inline_bytes)

        return await self._read(call, {**_tree(batch), "vectors": vectors}, work)

    async def forward(
        self, inputs: Value, training: bool, seed: int | None, max_inline_bytes: int | None, call: Call
    ) -> ForwardResult:
        """The outputs for some inputs. With `training`, buffers move: a command."""

        async def deliver(result: ForwardResult) -> ForwardResult:
            return await deliver_outputs(result, self._tensors.downloads, max_inline_bytes)

        async def store(result: ForwardResult) -> ForwardResult:
            delivered = await deliver(result)
            self._commands.weigh(call, inline_bytes(delivered.outputs))
            return delivered

        if training:
            return await self._command(
                call,
                {"inputs": inputs},
                lambda values, number: self._workers.forward(
                    values["inputs"], training=True, seed=seed, command=number
                ),
                store,
            )

        async def work(values: Any) -> ForwardResult:
            return await deliver(await self._workers.forward(values["inputs"], training=False, seed=seed, command=0))

        return await self._read(call, {"inputs": inputs}, work)

    async def state_dict(
        self, names: tuple[str, ...] | None, max_inline_bytes: int | None, call: Call
    ) -> tuple[NamedTensors, int]:
        """(tensors, step). `names`: names or globs, None for all."""

        async def work(_: Any) -> tuple[NamedTensors, int]:
            tensors, step = await self._workers.state_dict(names)
            return await self._tensors.downloads.deliver(tensors, max_inline_bytes), step

        return await self._read(call, None, work)

    async def optimizer_state(self, max_inline_bytes: int | None, call: Call) -> tuple[Value, int]:
        """(state of the optimizer and its schedule, step)."""

        async def work(_: Any) -> tuple[Value, int]:
            state, step = await self._workers.optimizer_state()
            return await self._tensors.downloads.deliver(state, max_inline_bytes), step

        return await self._read(call, None, work)

    # --- the life of a model --------------------------------------------------------------------------------------

    async def idle(self) -> None:
        """Return when no request waits or runs."""
        await self._queue.idle()

    async def close(self) -> None:
        """Refuse what waits and what still comes, and free the ranks, after what runs has ended.

        What runs for longer than the setting delete_seconds ends with the ranks' processes.
        """
        self.description.deleting()
        self._workers.on_lost = None
        self.autograd.close()
        ended = await self._queue.close(deleted(self.description.name), self._delete_seconds)
        await self._workers.close(reuse=ended and not self.description.has_failed)
        if not ended:
            await self._queue.cut()

    # --- how requests run -----------------------------------------------------------------------------------------

    async def _command(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any, int], Awaitable[T]],
        deliver: Callable[[T], Awaitable[T]] | None = None,
    ) -> T:
        """Run `work(tensors, number)` once for the request id of `call`. `deliver` changes the reply, not the model."""
        job = self._commands.find(call)
        if job is None:

            async def apply(values: Any) -> T:
                result = await work(values, self._number + 1)
                self.description.applied(result)
                reply = result if deliver is None else await self._deliver(deliver, result, call)
                self._number += 1
                return reply

            job = self._submit(call, tensors, apply, self._command_failed)
            self._commands.add(call, job)
        return await job.result(call.deadline)

    async def _deliver(self, deliver: Callable[[T], Awaitable[T]], result: T, call: Call) -> T:
        try:
            return await deliver(result)
        except Exception as error:
            refusal = public_error(error, call.request_id)
            refusal.outcome = "applied"
            raise refusal from None

    def _command_failed(self, error: GradwireError) -> None:
        # Only applied commands have numbers: what was refused leaves no trace, in random numbers neither.
        self._number += error.outcome == "applied"
        self.description.met(error)

    async def _read(self, call: Call, tensors: Any, work: Callable[[Any], Awaitable[T]]) -> T:
        """Run `work(tensors)` in its turn."""
        return await self._submit(call, tensors, work).result(call.deadline)

    def _submit(
        self,
        call: Call,
        tensors: Any,
        work: Callable[[Any], Awaitable[T]],
        failed: Callable[[GradwireError], None] | None = None,
    ) -> Job[T]:
        self.description.check_usable()

        async def run(values: Any) -> T:
            # Again: the model may have failed while the request waited.
            self.description.check_usable()
            return await work(values)

        return self._queue.submit(call, tensors, run, failed)


def _tree(batch: Batch) -> dict[str, Value]:
    return {"batch": {"inputs": batch.inputs, "targets": batch.targets}}


def _batch(values: Any) -> Batch:
    return Batch(**values["batch"])
