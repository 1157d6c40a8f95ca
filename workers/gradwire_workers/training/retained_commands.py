"""Forwards that are retained, and gone back through later: the client's own autograd passes through the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from gradwire_proto.values import BackwardQuery, Retention
from gradwire_workers.shard import Shard
from gradwire_workers.training import tensor_names
from gradwire_workers.training.attempt import Attempt
from gradwire_workers.training.clock import Clock
from gradwire_workers.training.passes import take
from gradwire_workers.training.rank_model import RankModel
from gradwire_workers.training.reports import BackwardReport, RetainedReport


class RetainedCommands(RankModel):
    """The commands. Every rank is given the same, each its rows."""

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
            self._agreement.reach(self._groups, gradients=self._judged(list(done.gradients.values())))
        self._held.hold(held)
        return BackwardReport(
            input_gradients=done.input_gradients, step=self.step, rows=shard.count, seconds=clock.computed()
        )

    def release(self, names: Sequence[str]) -> None:
        """Let go of retained forwards."""
        self._retained.release(names)
