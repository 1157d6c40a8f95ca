"""A rank's part of a fit: steps and evaluations on datasets that it maps once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gradwire_proto.tensors import to_torch
from gradwire_proto.values import TensorData
from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.dataset_batches import BatchKind, DatasetBatches
from gradwire_workers.training.row_orders import RowOrders, recorded
from gradwire_workers.training.step_run import StepRun

Fields = Mapping[str, Any]


class RankFitting:
    """See the module. What was mapped for one command stays mapped for the next."""

    def __init__(self) -> None:
        self._trained_on = _Mapped()
        self._evaluated = _Mapped()
        self._orders = RowOrders()

    def run(self, trainer: Trainer, fields: Fields) -> StepRun:
        """The steps that a command asks for, yet to go."""
        examples, seed, rows = fields["examples"], fields["seed"], fields["rows"]
        chosen = None
        if seed is not None:
            chosen = self._orders.beginning_with(seed, examples)
        elif rows is not None:
            chosen = recorded(rows, examples, fields["first"] * fields["batch_size"])
        batches = DatasetBatches(
            self._trained_on.kinds(fields["kinds"]),
            examples=examples,
            batch_size=fields["batch_size"],
            first=fields["first"],
            steps=fields["steps"],
            chosen=chosen,
        )
        return StepRun(trainer, batches, fields["command"])

    def evaluate(self, trainer: Trainer, fields: Fields) -> Fields:
        """The losses of the batches that are asked for."""
        batches = DatasetBatches(
            self._evaluated.kinds(fields["kinds"]),
            examples=fields["examples"],
            batch_size=fields["batch_size"],
            first=fields["first"],
            steps=fields["batches"],
            chosen=None,
        )
        found = trainer.evaluate(batches, first=fields["first"])
        return {"losses": found.losses, "seconds": found.seconds._asdict()}

    def forget(self) -> None:
        """Let go of what is mapped, and of the order of its rows."""
        self._trained_on, self._evaluated, self._orders = _Mapped(), _Mapped(), RowOrders()


class _Mapped:
    """The tensors of the dataset that was used last."""

    def __init__(self) -> None:
        self._tensors: dict[TensorData, torch.Tensor] = {}

    def kinds(self, fields: Sequence[Fields]) -> list[BatchKind]:
        """The kinds of batches that a command describes. What they do not have is let go of."""
        before, self._tensors = self._tensors, {}
        return [
            BatchKind(
                shard=Shard(
                    **{
                        **kind["shard"],
                        "inputs": self._leaves(kind["shard"]["inputs"], before),
                        "targets": self._leaves(kind["shard"]["targets"], before),
                    }
                ),
                split_inputs=kind["split_inputs"],
                split_targets=kind["split_targets"],
            )
            for kind in fields
        ]

    def _leaves(self, values: Sequence[Any], before: Mapping[TensorData, torch.Tensor]) -> tuple[Any, ...]:
        return tuple(self._map(value, before) if isinstance(value, TensorData) else value for value in values)

    def _map(self, value: TensorData, before: Mapping[TensorData, torch.Tensor]) -> torch.Tensor:
        tensor = self._tensors.get(value)
        if tensor is None:
            tensor = before.get(value)
            self._tensors[value] = tensor = to_torch(value) if tensor is None else tensor
        return tensor


def report_of(run: StepRun, step: int, error: Fields | None, *, needs_rejoin: bool) -> Fields:
    """What a rank answers. error: what refused the step behind those that were applied."""
    return {
        "losses": run.losses,
        "step": step,
        "rows": run.rows,
        "seconds": run.seconds._asdict(),
        "error": error,
        "needs_rejoin": needs_rejoin,
    }
