"""What is asked of a rank's model and leaves it as it is, but for a forward in training mode."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import DerivativeQuery, GradientQuery
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.agreement import Agreement
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.derivatives import derive
from gradwire_workers.training.gradient_readers import ParameterNames, gradient_reader
from gradwire_workers.training.passes import take
from gradwire_workers.training.rank_model import RankModel
from gradwire_workers.training.reports import DerivativeReport, EvaluationReport, ForwardReport, GradientReport
from gradwire_workers.training.top_k import largest


class Reads(RankModel):
    """The reads. In a split batch, every rank at the same time."""

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
        gradients: dict[str, Any] = found.gradients if is_whole or query.per_example else {}
        if query.top_k is not None:
            gradients = {name: largest(each, query.top_k) for name, each in gradients.items()}
        return GradientReport(
            loss=loss,
            step=self.step,
            rows=found.rows,
            gradients=gradients,
            input_gradients=found.input_gradients,
            outputs=found.outputs,
            seconds=clock.computed(),
        )

    def evaluate(self, shards: Iterable[Shard], *, first: int) -> EvaluationReport:
        """The losses of batches, one after another, as `compute_gradients` gives them. Changes nothing.

        first: the number of the first; an error names the batch that it is about.
        """
        clock, groups = Clock(self._groups), self._groups
        self._replica.check_has_loss()
        losses: list[float] = []
        try:
            for shard in shards:
                with Attempt(groups, self._program.mutated_buffers(shard.variant), changes=False):
                    losses.append(float(self._passes.local(self._localised(shard), (), 0).value))
        except GradwireError as error:
            raise type(error)(f"batch {first + len(losses)}: {error.message}", **error.attributes()) from error
        if groups is not None:
            # Once for all of them: where batches are small, it takes longer than they do.
            with Attempt(groups, ()):
                losses = groups.all_reduce(torch.tensor(losses, dtype=torch.float64)).tolist()
        return EvaluationReport(losses=losses, seconds=clock.computed())

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
                has_conditions=self._program.has_conditions(shard.variant),
            )
        return DerivativeReport(outputs=outputs, derivatives=derivatives, rows=shard.count, seconds=clock.computed())

    def forward(self, shard: Shard, *, training: bool, command: int, seed: int | None = None) -> ForwardReport:
        """The outputs of this rank's rows. With `training`, buffers move, on all ranks alike."""
        clock = Clock(self._groups)
        # Where there are no collectives, a rank that fails need not tell the others. Batch norm over all ranks' rows
        # has some, whatever the mode, and so has a loss among the outputs.
        talks = self._replica.synchronises(shard.variant) or self._replica.combines_outputs(shard.variant)
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

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, and its schedule's, live. Every rank has the same."""
        return self._checked_updater().state()
