"""One rank's training: forward, backward, gradients added up over the ranks, update. Plain PyTorch.

Knows nothing of Ray, gRPC or the wire. What several ranks compute equals, to rounding, what torch computes in one
process on the whole batch; a command that fails on one rank changes nothing on any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import (
    BackwardQuery,
    DerivativeQuery,
    GradientQuery,
    Limits,
    ModelSpec,
    OptimizerSpec,
    Retention,
    StateTensor,
    Variant,
)
from gradwire_workers.architectures.architecture_program import ArchitectureProgram
from gradwire_workers.optimizers import check_learning_rate
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.programs.build import add_variant
from gradwire_workers.rows_report import RowsReport
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.derivatives import derive
from gradwire_workers.training.gradient_readers import ParameterNames, gradient_reader
from gradwire_workers.training.held_gradients import HeldGradients
from gradwire_workers.training.line_search import search
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.passes import Passes, take
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.reports import (
    BackwardReport,
    DerivativeReport,
    ForwardReport,
    GradientReport,
    RetainedReport,
    StepReport,
)
from gradwire_workers.training.retained_forwards import RetainedForwards
from gradwire_workers.training.splitting import find_split
from gradwire_workers.training.trainable import set_trained, trained_parameters
from gradwire_workers.training.updater import Update, Updater
from gradwire_workers.training.updater_making import make_updater, updater_after


class Trainer:
    """One rank of a model: its replica, the gradients that it holds, and its optimizer's state.

    All ranks are given the same commands in the same order, each its shard. Not thread-safe.
    `state` must be writable and nobody else's; `groups` None: there is no other rank. `weights_folder`: where an
    architecture may find its first weights.
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
        weights_folder: str | None = None,
    ) -> None:
        self.step = 0
        """Updates applied."""
        self._limits = limits or Limits()
        self._replica = Replica(spec, state, rank, torch.device(device), self._limits, weights_folder)
        self._program = self._replica.program
        self._spec = spec
        trainable = trained_parameters(self._program)
        self._trainable = list(trainable.values())
        self._loss_scale = LossScale() if spec.precision == "fp16" else None
        self._updater = make_updater(spec, trainable, self._aliases(), self._loss_scale)
        self._agreement = Agreement(refuses_nan=spec.on_nan == "refuse")
        self._passes = Passes(self._replica, self._trainable)
        self._held = HeldGradients(self._trainable)
        self._retained = RetainedForwards(self._replica, self._passes, self._limits)
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
        self._retained.release_connected()
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

    def check_rows(self, variant_name: str, inputs: Sequence[Any], targets: Sequence[Any] = ()) -> RowsReport:
        """Whether the variant's batches may be split over the ranks; from here on its loss is combined accordingly.

        `inputs`, `targets`: an example's leaves, the same on every rank. All ranks call it together and get the same
        answer.
        """
        assert self._groups is not None, "a single rank splits nothing"
        with Attempt(self._groups, self._program.mutated_buffers(variant_name), changes=False):
            return find_split(self._replica, variant_name, inputs, targets)

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
        # From here on nothing fails.
        set_trained(self._program.parameters_by_name(), trained)
        self._spec, self._updater, self._trainable = spec, updater, list(trained.values())
        if updater is not None:
            updater.update_only(trained)
            if lr is not None:
                updater.set_learning_rate(lr)
        self._held = self._held.of_only(self._trainable)
        self._passes.drop()
        self._passes = Passes(self._replica, self._trainable)
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
        return self._updated(update, clock, loss=loss, rows=shard.count)

    def forward_backward(self, shard: Shard, *, command: int) -> StepReport:
        """Add the batch's gradients to those held, as loss.backward() does. They are summed over ranks when used."""
        clock = Clock(self._groups)
        self._replica.check_has_loss()
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant)):
            shard = self._localised(shard)
            done = self._passes.local(shard, self._trainable, command, to_learn=True)
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

    # --- forwards that are retained, and gone back through ----------------------------------------------------------

    def retained_forward(
        self, shard: Shard, retention: Retention, name: str, *, training: bool, command: int, seed: int | None = None
    ) -> RetainedReport:
        """The outputs of this rank's rows. Keeps under `name` what `backward` needs, if any output has a gradient.

        Raises ResourceExhausted RETAINED_BYTES, alike on every rank.
        """
        clock = Clock(self._groups)
        self._retained.release(retention.release)
        wrt = retention.wrt
        parameters = tensor_names.select_parameters(wrt, self._program.parameters_by_name(), self._aliases())
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant), changes=training):
            shard = self._replica.localise(shard)
            kept, outputs = self._retained.forward(shard, retention, parameters, command=command, seed=seed)
            buffers = self._passes.shared_buffers(shard) if training else []
            nbytes = int(self._agreement.reach(self._groups, kept.nbytes))
            self._retained.check_room(nbytes)
        take(buffers)
        if nbytes:
            self._retained.keep(name, replace(kept, nbytes=nbytes))
        return RetainedReport(
            outputs=outputs,
            differentiable=list(kept.outputs),
            step=self.step,
            rows=shard.count,
            seconds=clock.computed(),
        )

    def backward(self, query: BackwardQuery, cotangents: Sequence[Tensor | None]) -> BackwardReport:
        """Add the gradients of a retained forward to those held, given the cotangents of this rank's rows."""
        clock = Clock(self._groups)
        shard = self._retained.get(query.retained).shard
        with Attempt(self._groups, ()):
            done = self._retained.backward(query, cotangents)
            held = self._held.plus(done.gradients)
            self._agreement.reach(self._groups, gradients=done.gradients.values())
        self._held.hold(held)
        return BackwardReport(
            input_gradients=done.input_gradients, step=self.step, rows=shard.count, seconds=clock.computed()
        )

    def release(self, names: Sequence[str]) -> None:
        """Let go of retained forwards."""
        self._retained.release(names)

    # --- reads, and forward ---------------------------------------------------------------------------------------

    def compute_gradients(
        self, shard: Shard, query: GradientQuery, *, command: int = 0, vectors: Mapping[str, Tensor] | None = None
    ) -> GradientReport:
        """Loss, gradients and outputs. Changes nothing, buffers included.

        vectors: gives the Hessian of the loss times these, by parameter name, in place of gradients.
        """
        clock = Clock(self._groups)
        self._replica.check_has_loss()
        names = ParameterNames(self._program.parameters_by_name(), self._aliases())
        read = gradient_reader(self._passes, self._replica, names, query, vectors, self._limits)
        with Attempt(self._groups, self._program.mutated_buffers(shard.variant), changes=False):
            found = read(self._localised(shard), command)
            # Read only: it is for the caller to judge a loss that is not finite.
            loss = Agreement(refuses_nan=False).reach(self._groups, found.value)
        is_whole = self._groups is None or self._groups.rank == 0
        return GradientReport(
            loss=loss,
            step=self.step,
            rows=found.rows,
            gradients=found.gradients if is_whole or query.per_example else {},
            input_gradients=found.input_gradients,
            outputs=found.outputs,
            seconds=clock.computed(),
        )

    def differentiate(self, shard: Shard, query: DerivativeQuery, vectors: Sequence[Tensor]) -> DerivativeReport:
        """Derivatives of the outputs with respect to the inputs. For functions, which have no other rank."""
        clock = Clock(None)
        with Attempt(None, self._program.mutated_buffers(shard.variant), changes=False):
            outputs, derivatives = derive(
                self._replica.repeatable(shard, query.seed),
                self._replica.localise(shard).inputs,
                query,
                vectors,
                tensor_bytes=self._limits.tensor_bytes,
                has_functions=self._program.has_functions(shard.variant),
            )
        return DerivativeReport(outputs=outputs, derivatives=derivatives, rows=shard.count, seconds=clock.computed())

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

    def held_gradients(self, wrt: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The held gradients over all ranks' rows, by name; of parameters that have one. Every rank has the same."""
        parameters = tensor_names.select_parameters(wrt, self._program.parameters_by_name(), self._aliases())
        if not self._held:
            return {}
        with Attempt(self._groups, ()):
            summed = dict(zip(self._trainable, self._held.summed(self._groups), strict=True))
        found = {name: summed[each] for name, each in parameters.items() if isinstance(each, nn.Parameter)}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

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

    def _localised(self, shard: Shard) -> Shard:
        """The shard on this rank's device, for a backward that starts with the loss scale of now."""
        self._replica.scale = 1.0 if self._loss_scale is None else self._loss_scale.value
        return self._replica.localise(shard)

    def _judged(self, gradients: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Those that must be finite where the model refuses others: none where a loss scale is still to be found."""
        return gradients if self._loss_scale is None else ()

    @property
    def _reported_scale(self) -> float | None:
        return None if self._loss_scale is None or self._updater is None else self._loss_scale.value
