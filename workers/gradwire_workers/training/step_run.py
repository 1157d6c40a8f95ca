"""Training steps one after another, as far as they go."""

from __future__ import annotations

from collections.abc import Iterable

from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.reports import Seconds


class StepRun:
    """The steps of `shards`, the first of them numbered `command`. Each is wholly applied or not at all."""

    def __init__(self, trainer: Trainer, shards: Iterable[Shard], command: int) -> None:
        self._trainer = trainer
        self._shards = shards
        self._command = command
        self.losses: list[float] = []
        """Of the steps that were applied."""
        self._compute = self._all_reduce = self._optimizer = 0.0
        self.rows = 0
        """That this rank has computed in them."""

    def go(self) -> None:
        """Apply them. What a step raises ends it, where those before stay applied."""
        step, command = self._trainer.train_step, self._command
        for shard in self._shards:
            report = step(shard, command=command)
            command += 1
            assert report.loss is not None, "a step on a batch has a loss"
            self.losses.append(report.loss)
            self.rows += report.rows
            seconds = report.seconds
            self._compute += seconds.compute
            self._all_reduce += seconds.all_reduce
            self._optimizer += seconds.optimizer

    @property
    def seconds(self) -> Seconds:
        """Where the time of the steps that were applied went."""
        return Seconds(compute=self._compute, all_reduce=self._all_reduce, optimizer=self._optimizer)
