"""One rank's training: forward, backward, gradients added up over the ranks, update. Plain PyTorch.

Knows nothing of Ray, gRPC or the wire. What several ranks compute equals, to rounding, what torch computes in one
process on the whole batch; a command that fails on one rank changes nothing on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import OptimizerSpec, StateTensor, Variant
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.optimizers import check_learning_rate
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.programs.build import add_variant
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.kernel_commands import KernelCommands
from gradwire_workers.training.line_search import search
from gradwire_workers.training.loss_weights import weight_named
from gradwire_workers.training.passes import Passes, take
from gradwire_workers.training.reads import Reads
from gradwire_workers.training.reports import StepReport
from gradwire_workers.training.retained_commands import RetainedCommands
from gradwire_workers.training.retained_forwards import RetainedForwards
from gradwire_workers.training.splitting import find_split, split_like
from gradwire_workers.training.trainable import set_trained, trained_parameters
from gradwire_workers.training.updater import Update
from gradwire_workers.training.updater_making import updater_after


class Trainer(Reads, RetainedCommands, KernelCommands):
    """One rank of a model: what trains it. What else it does is in its base classes.

    All ranks are given the same commands in the same order, each its shard. Not thread-safe.
    """

    # --- variants, and settings -----------------------------------------------------------------------------------

    def add_variant(
        self,
        variant: Variant,
        tensors: Sequence[StateTensor],
        values: Mapping[str, Tensor],
        operators: Mapping[str, str],
    ) -> None:
        """Add a graph for other shapes, with the constants that only it uses."""
        assert isinstance(self._program, BuiltProgram), "the frontend refuses variants of architectures"
        add_variant(self._program, variant, tuple(tensors), values, operators, limits=self._limits)

    @property
    def built_tensors(self) -> tuple[StateTensor, ...]:
        """The tensors of an architecture; of a program of graphs, which the client described, none."""
        return self._program.tensors if isinstance(self._program, ArchitectureProgram) else ()

    def open_variant(self, variant: Variant, inputs: Sequence[Any]) -> Variant:
        """Take batches of an architecture like this one from now on. Returns the variant with what the module gives."""
        assert isinstance(self._program, ArchitectureProgram), "graphs are opened by their client"
        with Attempt(None, (), changes=False):
            return self._program.open(variant, self._replica.moved(inputs))

    def check_rows(
        self,
        variant_name: str,
        inputs: Sequence[Any],
        targets: Sequence[Any] = (),
        *,
        seconds: float = inf,
        like: tuple[str, RowsReport] | None = None,
    ) -> RowsReport:
        """Whether the variant's batches may be split over the ranks; from here on its loss is combined accordingly.

        `inputs`, `targets`: an example's leaves, the same on every rank. All ranks call it together and get the same
        answer. A single rank splits nothing, and tries what the client said of the loss. seconds: how long it may take,
        about. like: another variant, and what the call before this found for it with the same leaves.
        """
        with Attempt(self._groups, self._program.mutated_buffers(variant_name), changes=False):
            known = None if like is None else split_like(self._replica, variant_name, *like)
            return known or find_split(self._replica, variant_name, inputs, targets, seconds=seconds)

    def weigh(self, variant_name: str, key: str) -> None:
        """Combine the variant's loss by a weight that `check_rows` found. FailedPrecondition STATE_UNFIT for none."""
        replica = self._replica
        replica.weigh(variant_name, weight_named(key, replica.graphs, replica.program.variant(variant_name)))

    def update(
        self,
        *,
        trainable: Sequence[tuple[str, bool]] = (),
        optimizer: OptimizerSpec | None = None,
        lr: float | None = None,
    ) -> list[str]:
        """Change settings, all or none; every rank must get the same. Returns the names of the trained parameters.

        What is frozen loses the gradient that is held of it, and keeps its optimizer's state until it is unfrozen.
        """
        check_learning_rate(lr)
        trained = trained_parameters(self._program, trainable)
        spec = self._spec if optimizer is None else replace(self._spec, optimizer=optimizer)
        updater = updater_after(
            self._updater, spec, trained, self._aliases(), self._loss_scale, anew=optimizer is not None
        )
        if lr is not None and updater is None:
            self._checked_updater()
        if lr is not None and spec.optimizer is not None:
            # What is unfrozen later may make a group that there is not yet.
            spec = replace(spec, optimizer=spec.optimizer.with_learning_rate(lr))
        # From here on nothing fails.
        set_trained(self._program.parameters_by_name(), trained)
        self._spec, self._updater, self._trainable = spec, updater, list(trained.values())
        if updater is not None:
            updater.update_only(trained)
            if lr is not None:
                updater.set_learning_rate(lr)
        self._held = self._held.of_only(self._trainable)
        self._passes.drop()
        if trainable:
            # Kernels give the gradients of the parameters that were trained before.
            self._drop_kernels()
        self._passes = Passes(self._replica, self._trainable, self._kernels)
        # What is retained was for the parameters that were trained before.
        self._retained = RetainedForwards(self._replica, self._passes, self._limits)
        return list(trained)

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
            shard = self._localised(shard)
            done = self._passes.summed(shard, command)
            buffers = self._passes.shared_buffers(shard)
            loss = self._agreement.reach(self._groups, done.value, self._judged(done.gradients))
            plan = updater.plan(loss)
        take(buffers)
        clock.computed(waited=done.waited)
        update = updater.apply(done.gradients, lr=lr, plan=plan)
        # Freed while the clock runs, as a loop's zero_grad() does within its step.
        del done
        return self._updated(update, clock, loss=loss, rows=shard.count)

    def forward_backward(self, shard: Shard, *, command: int) -> StepReport:
        """Add the batch's gradients to those held, as loss.backward() does. They are summed over ranks when used."""
        clock = Clock(self._groups)
        self._replica.check_has_loss()
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant)):
            shard = self._localised(shard)
            done = self._passes.to_learn(shard, command)
            held = self._held.plus(dict(zip(self._trainable, done.gradients, strict=True)))
            buffers = self._passes.shared_buffers(shard)
            loss = self._agreement.reach(self._groups, done.value, self._judged(done.gradients))
        take(buffers)
        self._held.hold(held)
        return StepReport(
            loss=loss,
            step=self.step,
            rows=shard.count,
            lr=None if self._updater is None else self._updater.lr,
            seconds=clock.computed(),
            loss_scale=self._reported_scale,
        )

    def optimizer_step(
        self,
        gradients: Mapping[str, Tensor] | None = None,
        *,
        lr: float | None = None,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> StepReport:
        """Update with the held gradients, which stay held, or with these, by name, which every rank must get.

        A parameter without a gradient is left alone. groups: options that the parameter groups take first, and keep.
        """
        clock = Clock(self._groups)
        updater = self._checked_updater()
        updater.check(lr, has_batch=False)
        updater.check_groups(groups)
        if gradients is not None:
            given = tensor_names.check_gradients(gradients, self._program.state_tensors())
            chosen = [given.get(parameter) for parameter in self._trainable]
            self._agreement.reach(None, gradients=chosen)
            plan = updater.plan()
        elif not self._held:
            raise FailedPrecondition("no gradients are held: call forward_backward first", reason="NO_GRADIENTS")
        else:
            with Attempt(self._groups, ()):
                chosen = self._held.summed(self._groups)
                self._agreement.reach(self._groups, gradients=self._judged(chosen))
                plan = updater.plan()
        clock.computed()
        updater.take_groups(groups)
        update = updater.apply(chosen, lr=lr, plan=plan, keep=True, given=gradients is not None)
        return self._updated(update, clock, loss=None, rows=0)

    def zero_grad(self) -> None:
        """Drop the held gradients."""
        self._held.drop()

    def set_gradients(self, gradients: Mapping[str, Tensor], dropped: Sequence[str]) -> None:
        """Hold these gradients by name in place of those that are held, and none of `dropped`. The same on every rank.

        They must be nobody else's.
        """
        given = tensor_names.check_gradients(gradients, self._program.state_tensors())
        trainable = {name: each for name, each in self._aliases().items() if each.requires_grad}
        chosen = tensor_names.select(dropped, trainable, field="dropped")
        without = {trainable[name] for name in chosen}
        if not given.keys().isdisjoint(without):
            message = "a parameter stands in gradients too"
            raise InvalidArgument(message, field="dropped", reason="GRADIENT_GIVEN_TWICE")
        new: dict[nn.Parameter, Tensor | None] = {**given, **dict.fromkeys(without)}
        self._held.put(new, self._groups)

    def load_state_dict(self, tensors: Mapping[str, Tensor], *, partial: bool) -> None:
        """Replace parameters and buffers by name, all or none. Every rank must get the same."""
        tensor_names.load(tensors, self.state_dict(), partial=partial)

    def load_optimizer_state(self, state: Any) -> None:
        """Replace the optimizer's state and its schedule's, or neither. Every rank must get the same."""
        self._checked_updater().load(state)

    def _updated(self, update: Update, clock: Clock, *, loss: float | None, rows: int) -> StepReport:
        self.step += not update.skipped
        seconds = clock.updated()
        return StepReport(
            loss=loss,
            step=self.step,
            rows=rows,
            lr=update.lr,
            grad_norm=update.grad_norm,
            seconds=seconds,
            skipped=update.skipped,
            loss_scale=self._reported_scale,
        )
