"""A rank's end of steps that come together: each is carried out as one that came alone, and answered bit by bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import TensorData
from gradwire_workers.packed_steps import ALIGNMENT, SMALL_BYTES
from gradwire_workers.rank_tensors import leaves_in
from gradwire_workers.shard import Shard
from gradwire_workers.step_rows import StepRow
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.reports import StepReport

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A small tensor of a layout: where it lies in the buffer of all follows from those before it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    count: int
    nbytes: int

    def read(self, small: memoryview, position: int) -> Tensor:
        """Not a slice of one tensor of all: what a program writes to one must not count as a change of another."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(small, dtype=self.dtype, count=self.count, offset=position).view(self.shape)


class _Layout:
    """A layout of a message: `make` takes a step's leaves, inputs first."""

    def __init__(self, fields: Fields) -> None:
        self.leaves = [_leaf(*each) for each in (*fields["inputs"], *fields["targets"])]
        self._inputs = len(fields["inputs"])
        self._fields = {name: value for name, value in fields.items() if name not in ("inputs", "targets")}

    def shard(self, leaves: Sequence[Any]) -> Shard:
        return Shard(**self._fields, inputs=tuple(leaves[: self._inputs]), targets=tuple(leaves[self._inputs :]))


def described_shard(fields: Fields) -> Shard:
    """A shard of a layout, with zeros in it."""
    leaves = {name: tuple(_zeros(*each) for each in fields[name]) for name in ("inputs", "targets")}
    return Shard(**{**fields, **leaves})


def _zeros(kind: str, *content: Any) -> Any:
    # Of no memory: only types and shapes are looked at.
    return content[0] if kind == "constant" else torch.zeros((), dtype=torch_dtype(content[0])).expand(content[1])


def _leaf(kind: str, *content: Any) -> Any:
    """A small tensor, a TensorData without its bytes for a large one, or a constant in a tuple."""
    if kind == "constant":
        return content
    dtype, shape = content
    described = TensorData(dtype, tuple(shape), b"")
    if described.nbytes >= SMALL_BYTES:
        return described
    return _Tensor(torch_dtype(dtype), described.shape, prod(shape), described.nbytes)


class RankSteps:
    """The steps of one message."""

    def __init__(self, fields: Fields) -> None:
        header = json.loads(bytes(fields["steps"]))
        self._layouts = [_Layout(each) for each in header["layouts"]]
        self._steps = header["steps"]
        self._small, *self._large = fields["data"]

    def carry_out(
        self, trainer: Trainer, guarded: Callable[[Callable[[], StepReport], int], StepReport]
    ) -> Iterator[StepRow]:
        """Each step's row, as soon as it was applied. The first that fails raises; those behind it are not begun.

        guarded: carries out the command of that number as each that comes alone.
        """
        shards = self._shards()
        for _, command, number, lr in self._steps:
            began = perf_counter()
            # Inside: a shard that one rank alone cannot read is its failure, which the others must hear of.
            report = guarded(lambda of=command, lr=lr: trainer.train_step(next(shards), command=of, lr=lr), number)
            yield _row(report, perf_counter() - began)

    def _shards(self) -> Iterator[Shard]:
        (joined,) = leaves_in([TensorData("uint8", (len(self._small),), self._small)])
        small = joined.numpy().data
        large, position = iter(self._large), 0
        for index, *_ in self._steps:
            layout, leaves = self._layouts[index], []
            for leaf in layout.leaves:
                if isinstance(leaf, _Tensor):
                    leaves.append(leaf.read(small, position))
                    position += leaf.nbytes + -leaf.nbytes % ALIGNMENT
                elif isinstance(leaf, TensorData):
                    leaves += leaves_in([TensorData(leaf.dtype, leaf.shape, next(large))])
                else:
                    leaves += leaf
            yield layout.shard(leaves)


def _row(report: StepReport, busy: float) -> StepRow:
    seconds = report.seconds
    return StepRow(
        loss=report.loss,
        step=report.step,
        lr=report.lr,
        grad_norm=report.grad_norm,
        skipped=report.skipped,
        loss_scale=report.loss_scale,
        compute=seconds.compute,
        all_reduce=seconds.all_reduce,
        optimizer=seconds.optimizer,
        busy=busy,
    )
