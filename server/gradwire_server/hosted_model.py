"""What can be asked of one model, and what its ranks do for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gradwire_proto.names import command_name
from gradwire_proto.values import (
    Batch,
    Checkpoint,
    CommandInfo,
    ForwardResult,
    GradientQuery,
    GradientResult,
    ModelInfo,
    ModelUpdate,
    NamedTensors,
    StateTensor,
    StepResult,
    Value,
    Variant,
)
from gradwire_server.calls import Call
from gradwire_server.fit_commands import FitCommands
from gradwire_server.hosting import Hosting
from gradwire_server.model_description import ModelDescription
from gradwire_server.model_life import ModelLife
from gradwire_server.program_checks import check_new_variant, check_variant_fits
from gradwire_server.replies import deliver_gradients, deliver_outputs, inline_bytes
from gradwire_server.request_log import command_info
from gradwire_server.workers import Workers


class HostedModel:
    """The commands and reads of a model, which run one at a time in the order in which they came.

    A command that gives a request id runs once: a repeat waits for it, or gets its reply. One that nobody waits for any
    more when its turn comes is not applied; one that was begun ends, whoever waits.
    """

    def __init__(self, description: ModelDescription, hosting: Hosting) -> None:
        self.description = description
        self.life = ModelLife(description, hosting)
        self.autograd = self.life.autograd
        """The commands of clients whose own autograd goes through the model."""
        self.steps = self.life.steps
        """Its training steps that come in streams."""
        self.commands = self._commands = self.life.commands
        self.fitting = FitCommands(self._commands, lambda: self._workers)
        """What fits ask of it."""
        self._tensors = hosting.tensors
        self._limits = hosting.limits

    @property
    def _workers(self) -> Workers:
        """Its ranks, as they are now."""
        return self.life.ranks.workers

    # --- commands -------------------------------------------------------------------------------------------------

    async def train_step(self, batch: Batch, lr: float | None, call: Call) -> StepResult:
        """Forward, backward and update."""
        return await self._commands.run(
            call,
            _tree(batch),
            lambda values, number: self._workers.train_step(_batch(values), command=number, lr=lr),
        )

    async def forward_backward(self, batch: Batch, call: Call) -> StepResult:
        """Add the gradients of a batch to those that are held."""
        return await self._commands.run(
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
        return await self._commands.run(
            call,
            {"gradients": gradients},
            lambda values, _: self._workers.optimizer_step(values["gradients"], lr=lr, groups=groups),
        )

    async def zero_grad(self, call: Call) -> None:
        """Drop the held gradients."""
        await self._commands.run(call, None, lambda _, __: self._workers.zero_grad())

    async def load_state_dict(self, tensors: NamedTensors, partial: bool, call: Call) -> int:
        """Replace parameters and buffers; returns the step."""
        return await self._commands.run(
            call,
            {"tensors": tensors},
            lambda values, _: self._workers.load_state_dict(values["tensors"], partial=partial),
        )

    async def load_optimizer_state(self, state: Value, call: Call) -> int:
        """Replace the state of the optimizer and its schedule; returns the step."""
        return await self._commands.run(
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

        return await self._commands.run(call, None, work)

    async def add_variant(
        self,
        variant: Variant,
        tensors: tuple[StateTensor, ...],
        values: NamedTensors,
        operators: Mapping[str, str],
        example: Batch | None,
        call: Call,
    ) -> ModelInfo:
        """Add a graph, and constants that it alone uses; returns the model as it is after that."""
        known = self.description
        # Not of a repeat: its variant is there already. Nor once more, when limits may be others.
        if call.replay is None and self._commands.log.find(call) is None:
            await asyncio.to_thread(
                check_new_variant, known.info, known.operators, variant, tensors, operators, values, self._limits
            )

        async def work(claimed: Any, _: int) -> ModelInfo:
            if call.replay is None:
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
            return known.info

        example_tree = _tree(example)["batch"] if example is not None else None
        return await self._commands.run(call, {"values": values, "example": example_tree}, work)

    async def save(self, name: str | None, call: Call) -> Checkpoint:
        """Save the model under a name, None for one that is made up. Its files hold all that came before this call.

        Raises AlreadyExists CHECKPOINT_EXISTS, and errors of the storage. A repeat of the request gets its answer.
        """
        return await self.life.checkpoints.save(name, call)

    async def command(self, request_id: str, *, wait: bool) -> CommandInfo:
        """What became of the command, or `save`, with that request id; with `wait`, once it has ended.

        Raises ModelNotFound COMMAND_NOT_FOUND, and what comes with that id later is refused; the command's own error
        where nobody knows what became of it; what `ModelRecovery.knows` raises.
        """
        await self.life.recovery.knows(request_id, wait=wait)
        name = command_name(self.description.info.id, request_id)
        if request_id not in self._commands.log:
            saving = await self.life.checkpoints.request(request_id)
            if saving is not None:
                return await command_info(name, saving, wait=wait)
        return await command_info(name, await self._commands.seen(request_id), wait=wait)

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

        return await self._commands.read(call, {**_tree(batch), "vectors": vectors}, work, at_once=True)

    async def forward(
        self, inputs: Value, training: bool, seed: int | None, max_inline_bytes: int | None, call: Call
    ) -> ForwardResult:
        """The outputs for some inputs. With `training`, buffers move: a command."""

        async def deliver(result: ForwardResult) -> ForwardResult:
            return await deliver_outputs(result, self._tensors.downloads, max_inline_bytes)

        async def store(result: ForwardResult) -> ForwardResult:
            delivered = await deliver(result)
            self._commands.log.weigh(call, inline_bytes(delivered.outputs))
            return delivered

        if training:
            return await self._commands.run(
                call,
                {"inputs": inputs},
                lambda values, number: self._workers.forward(
                    values["inputs"], training=True, seed=seed, command=number
                ),
                store,
            )

        async def work(values: Any) -> ForwardResult:
            return await deliver(await self._workers.forward(values["inputs"], training=False, seed=seed, command=0))

        return await self._commands.read(call, {"inputs": inputs}, work)

    async def state_dict(
        self, names: tuple[str, ...] | None, max_inline_bytes: int | None, call: Call
    ) -> tuple[NamedTensors, int]:
        """(tensors, step). `names`: names or globs, None for all."""

        async def work(_: Any) -> tuple[NamedTensors, int]:
            tensors, step = await self._workers.state_dict(names)
            return await self._tensors.downloads.deliver(tensors, max_inline_bytes), step

        return await self._commands.read(call, None, work)

    async def optimizer_state(self, max_inline_bytes: int | None, call: Call) -> tuple[Value, int]:
        """(state of the optimizer and its schedule, step)."""

        async def work(_: Any) -> tuple[Value, int]:
            state, step = await self._workers.optimizer_state()
            return await self._tensors.downloads.deliver(state, max_inline_bytes), step

        return await self._commands.read(call, None, work)


def _tree(batch: Batch) -> dict[str, Value]:
    return {"batch": {"inputs": batch.inputs, "targets": batch.targets}}


def _batch(values: Any) -> Batch:
    return Batch(**values["batch"])
