"""One rank's training: forward, backward, gradients added up over the ranks, update. Plain PyTorch.

Knows nothing of Ray, gRPC or the wire. What several ranks compute equals, to rounding, what torch computes in one
process on the whole batch; a command that fails on one rank changes nothing on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import GradientQuery, Limits, ModelSpec, StateTensor, Variant
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs.build import add_variant
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.gradient_reading import read_gradients
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.line_search import search
from gradwire_workers.training.passes import Passes, take
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.reports import ForwardReport, GradientReport, StepReport
from gradwire_workers.training.splitting import find_split
from gradwire_workers.training.updater import Update, Updater, make_updater


class Trainer:
    """One rank of a model: its replica, the gradients that it holds, and its optimizer's state.

    All ranks are given the same commands in the same order, each its shard. Not thread-safe.
    `state` must be writable and nobody else's; `groups` None: there is no other rank.
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        state: dict[str, Tensor],
        rank: int = 0,
        groups: ProcessGroups | None = None,
        device: str = "cpu",
        limits: Limits | None = None,
    ) -> None:
        self.step = 0
        """Updates applied."""
        self._limits = limits or Limits()
        self._replica = Replica(spec, state, rank, torch.device(device), self._limits)
        self._program = self._replica.program
        trainable = {name: each for name, each in self._program.parameters_by_name().items() if each.requires_grad}
        self._trainable = list(trainable.values())
        self._updater = make_updater(spec, trainable, self._aliases())
        self._agreement = Agreement(refuses_nan=spec.on_nan == "refuse")
        self._passes = Passes(self._replica, self._trainable)
        self._held: list[Tensor | None] | None = None
        self._replica.groups = groups

    # --- life -----------------------------------------------------------------------------------------------------

    @property
    def needs_rejoin(self) -> bool:
        """Whether a command has failed on some rank, so that all must rejoin before the next."""
        return self._groups is not None and self._groups.failed

    def rejoin(self, epoch: int) -> None:
        """Join the other ranks again, who do the same at the same time. `epoch` must be new."""
        assert self._groups is not None, "a single rank has nobody to rejoin"
        self._passes.drop()
        self._replica.groups = self._groups.rejoin(epoch)

    def break_off(self, cause: str) -> None:
        """Make what the other ranks wait for fail at once: this one will not do its part."""
        if self._groups is not None:
            self._groups.abort(cause)

    def close(self) -> None:
        """Leave the other ranks and let go of every tensor. Nothing else may be called after it."""
        self._passes.drop()
        if self._groups is not None:
            self._groups.leave()
        self.__dict__.clear()

    def add_variant(
        self,
        variant: Variant,
        tensors: Sequence[StateTensor],
        values: Mapping[str, Tensor],
        operators: Mapping[str, str],
    ) -> None:
        """Add a graph for other shapes, with the constants that only it uses."""
        add_variant(self._program, variant, tuple(tensors), values, operators, limits=self._limits)

    def check_rows(self, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any] = ()) -> RowsReport:
        """Whether the variant's batches may be split over the ranks; from here on its loss is combined accordingly.

        `inputs`, `targets`: an example's leaves, the same on every rank. All ranks call it together and get the same
        answer.
        """
        assert self._groups is not None, "a single rank splits nothing"
        with Attempt(self._groups, self._program.mutated_buffers(variant_name), changes=False):
            return find_split(self._replica, variant_name, inputs, targets)

    # --- training -------------------------------------------------------------------------------------------------

    def train_step(self, shard: Shard, *, command: int, lr: float | None = None) -> StepReport:
        """Forward, backward, sum over the ranks, update. Leaves held gradients alone."""
        clock = Clock(self._groups)
        updater = self._checked_updater()
        updater.check(lr, has_batch=True)
        self._replica.check_has_loss()
        if updater.searches:
            shard = self._replica.localise(shard)
            loss, update = search(updater, self._passes, self._agreement, shard, command=command, lr=lr)
            clock.computed()
            return self._updated(update, clock, loss=loss, rows=shard.count)
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant)):
            shard = self._replica.localise(shard)
            done = self._passes.summed(shard, command)
            buffers = self._passes.shared_buffers(shard)
            loss = self._agreement.reach(self._groups, done.value, done.gradients)
            plan = updater.plan(loss)
        take(buffers)
        clock.computed(waited=done.waited)
        update = updater.apply(done.gradients, lr=lr, plan=plan)
        return self._updated(update, clock, loss=loss, rows=shard.count)

    def forward_backward(self, shard: Shard, *, command: int) -> StepReport:
        """Add the batch's gradients to those held, as loss.backward() does. They are summed over ranks when used."""
        clock = Clock(self._groups)
        self._replica.check_has_loss()
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant)):
            shard = self._replica.localise(shard)
            done = self._passes.local(shard, self._trainable, command, to_learn=True)
            before = self._held or [None] * len(self._trainable)
            held = [_sum(old, new) for old, new in zip(before, done.gradients, strict=True)]
            buffers = self._passes.shared_buffers(shard)
            loss = self._agreement.reach(self._groups, done.value, done.gradients)
        take(buffers)
        self._held = held
        lr = None if self._updater is None else self._updater.lr
        return StepReport(loss=loss, step=self.step, rows=shard.count, lr=lr, seconds=clock.computed())

    def optimizer_step(self, gradients: Mapping[str, Tensor] | None = None, *, lr: float | None = None) -> StepReport:
        """Update with the held gradients, which stay held, or with these, by name, which every rank must get.

        A parameter without a gradient is left alone.
        """
        clock = Clock(self._groups)
        updater = self._checked_updater()
        updater.check(lr, has_batch=False)
        if gradients is not None:
            given = tensor_names.check_gradients(gradients, self._program.state_tensors())
            chosen = [given.get(parameter) for parameter in self._trainable]
            self._agreement.reach(None, gradients=chosen)
            plan = updater.plan()
        elif self._held is None:
            raise FailedPrecondition("no gradients are held: call forward_backward first", reason="NO_GRADIENTS")
        else:
            with Attempt(self._groups, ()):
                chosen = self._held if self._groups is None else add_up(self._held, self._trainable, self._groups)
                self._agreement.reach(self._groups, gradients=chosen)
                plan = updater.plan()
        clock.computed()
        update = updater.apply(chosen, lr=lr, plan=plan, keep=True)
        return self._updated(update, clock, loss=None, rows=0)

    def zero_grad(self) -> None:
        """Drop the held gradients."""
        self._held = None

    # --- reads, and forward ---------------------------------------------------------------------------------------

    def compute_gradients(self, shard: Shard, query: GradientQuery, *, command: int = 0) -> GradientReport:
        """Loss, gradients and outputs. Changes nothing, buffers included."""
        clock = Clock(self._groups)
        self._replica.check_has_loss()
        parameters = tensor_names.select_parameters(query.wrt, self._program.parameters_by_name(), self._aliases())
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant), changes=False):
            shard = self._replica.localise(shard)
            read = read_gradients(self._passes, shard, query, parameters, command)
            # Read only: it is for the caller to judge a loss that is not finite.
            loss = Agreement(refuses_nan=False).reach(self._groups, read.value)
        return GradientReport(
            loss=loss,
            step=self.step,
            rows=shard.count,
            gradients=read.gradients if self._groups is None or self._groups.rank == 0 else {},
            input_gradients=read.input_gradients,
            outputs=read.outputs,
            seconds=clock.computed(),
        )

    def forward(self, shard: Shard, *, training: bool, command: int, seed: int | None = None) -> ForwardReport:
        """The outputs of this rank's rows. With `training`, buffers move, on all ranks alike."""
        clock = Clock(self._groups)
        # Where there are no collectives, a rank that fails need not tell the others. Batch norm over the batch's own
        # statistics has some, whatever the mode, and so has a loss among the outputs.
        talks = self._program.has_batch_norm(shard.variant) or self._replica.combines_outputs(shard.variant)
        groups = self._groups if training or talks else None
        with Attempt(groups, self._program.mutated_buffers(shard.variant), changes=training):
            shard = self._replica.localise(shard)
            outputs = self._passes.forward(shard, command, seed)
            buffers = self._passes.shared_buffers(shard) if training else []
            self._agreement.reach(groups)
        take(buffers)
        return ForwardReport(outputs=outputs, step=self.step, rows=shard.count, seconds=clock.computed())

    def state_dict(self, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Parameters and buffers by name, live; or those that the names and globs match. Every rank has the same."""
        everything = {name: tensor.detach() for name, tensor in self._program.state_tensors().items()}
        return everything if names is None else tensor_names.select(names, everything, field="names")

    def load_state_dict(self, tensors: Mapping[str, Tensor], *, partial: bool) -> None:
        """Replace parameters and buffers by name, all or none. Every rank must get the same."""
        tensor_names.load(tensors, self.state_dict(), partial=partial)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, and its schedule's, live. Every rank has the same."""
        return self._checked_updater().state()

    def load_optimizer_state(self, state: Any) -> None:
        """Replace the optimizer's state and its schedule's, or neither. Every rank must get the same."""
        self._checked_updater().load(state)

    # --- parts ----------------------------------------------------------------------------------------------------

    @property
    def _groups(self) -> ProcessGroups | None:
        return self._replica.groups

    def _aliases(self) -> dict[str, nn.Parameter]:
        """Parameters under every name that they have."""
        return {name: each for name, each in self._program.state_tensors().items() if isinstance(each, nn.Parameter)}

    def _checked_updater(self) -> Updater:
        if self._updater is None:
            raise FailedPrecondition("the model has no optimizer: give one to create_model", reason="NO_OPTIMIZER")
        return self._updater

    def _updated(self, update: Update, clock: Clock, *, loss: float | None, rows: int) -> StepReport:
        self.step += 1
        seconds = clock.updated()
        return StepReport(
            loss=loss, step=self.step, rows=rows, lr=update.lr, grad_norm=update.grad_norm, seconds=seconds
        )


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
