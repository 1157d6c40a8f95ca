"""A rank's end of steps that come together: each is carried out as one that came alone, and answered bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import TensorData
from gradwire_workers.frames import from_json
from gradwire_workers.packed_steps import ALIGNMENT, SMALL_BYTES
from gradwire_workers.rank_tensors import leaves_in
from gradwire_workers.shard import Shard
from gradwire_workers.step_memory import MappedMemory
from gradwire_workers.step_rows import StepRow
from gradwire_workers.trainer import Trainer
from gradwire_workers.training.reports import StepReport

Fields = Mapping[str, Any]

_MOST_KNOWN = 32


class _Layout:
    """A layout of messages. Their steps' small tensors take turns in the same memory, each until the next step's.

    small_bytes: what has fewer bytes is small.
    """

    def __init__(self, fields: Fields, small_bytes: float) -> None:
        self._small_bytes = small_bytes
        self._fields = {name: value for name, value in fields.items() if name not in ("inputs", "targets")}
        self._inputs = len(fields["inputs"])
        self._leaves: list[Any] = []
        """Those of a step; for a large tensor, a TensorData without its bytes."""
        self._places: list[tuple[memoryview, int, int]] = []
        """Of each small tensor: its memory, its bytes, and how many of the message's it takes up."""
        for kind, *content in (*fields["inputs"], *fields["targets"]):
            self._leaves.append(content[0] if kind == "constant" else self._tensor(*content))
        has_large = any(isinstance(leaf, TensorData) for leaf in self._leaves)
        self._shard = None if has_large else self._made(self._leaves)

    def _tensor(self, dtype: str, shape: Sequence[int]) -> Tensor | TensorData:
        described = TensorData(dtype, tuple(shape), b"")
        if described.nbytes >= self._small_bytes:
            return described
        # Nothing outlives a step that refers to its batch: what is kept of it is a copy.
        tensor = torch.empty(described.shape, dtype=torch_dtype(dtype))
        if described.nbytes:
            memory = tensor.view(-1).view(torch.uint8).numpy().data
            self._places.append((memory, described.nbytes, described.nbytes + -described.nbytes % ALIGNMENT))
        return tensor

    def take(self, small: memoryview, position: int, large: Iterator[Any]) -> tuple[Shard, int]:
        """A step's shard, and where its small tensors end that begin at `position`."""
        for memory, nbytes, room in self._places:
            memory[:] = small[position : position + nbytes]
            position += room
        if self._shard is not None:
            return self._shard, position
        leaves: list[Any] = []
        for leaf in self._leaves:
            if isinstance(leaf, TensorData):
                leaves += leaves_in([TensorData(leaf.dtype, leaf.shape, next(large))])
            else:
                leaves.append(leaf)
        return self._made(leaves), position

    def _made(self, leaves: Sequence[Any]) -> Shard:
        return Shard(**self._fields, inputs=tuple(leaves[: self._inputs]), targets=tuple(leaves[self._inputs :]))


def described_shard(fields: Fields) -> Shard:
    """A shard of a layout, with zeros in it."""
    leaves = {name: tuple(_zeros(*each) for each in fields[name]) for name in ("inputs", "targets")}
    return Shard(**{**fields, **leaves})


def _zeros(kind: str, *content: Any) -> Any:
    # Of no memory: only types and shapes are looked at.
    return content[0] if kind == "constant" else torch.zeros((), dtype=torch_dtype(content[0])).expand(content[1])


class KnownLayouts:
    """The layouts of messages that have come: most messages have those of one before, and take turns in its memory."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, float], list[_Layout]] = {}
        self.memory = MappedMemory()

    def of(self, described: bytes, small_bytes: float) -> list[_Layout]:
        """Those of a message, which are described so."""
        key = described, small_bytes
        found = self._known.get(key)
        if found is None:
            found = [_Layout(each, small_bytes) for each in from_json(described)]
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = found
        return found


class RankSteps:
    """The steps of one message."""

    def __init__(self, fields: Fields, known: KnownLayouts) -> None:
        region = fields["region"]
        self._layouts = known.of(bytes(fields["layouts"]), SMALL_BYTES if region is None else inf)
        self._steps = from_json(fields["steps"])
        if region is None:
            self._small, *self._large = fields["data"]
        else:
            self._small, self._large = known.memory.view(region), []

    def carry_out(
        self, trainer: Trainer, applied: Callable[[int], None], failed: Callable[[int, BaseException], None]
    ) -> Iterator[StepRow]:
        """Each step's row, as soon as it was applied. The first that fails raises; those behind it are not begun.

        applied: told the number of each command. failed: told that of the one that failed; what it raises comes out.
        """
        shards = self.shards()
        for _, command, number, lr in self._steps:
            began = perf_counter()
            try:
                # Inside: a shard that one rank alone cannot read is its failure, which the others must hear of.
                report = trainer.train_step(next(shards), command=command, lr=lr)
            except BaseException as error:
                failed(number, error)
                raise
            applied(number)
            yield _row(report, perf_counter() - began)

    def shards(self) -> Iterator[Shard]:
        """Each step's, good until the next one is asked for."""
        small, large, position = memoryview(self._small), iter(self._large), 0
        for index, *_ in self._steps:
            shard, position = self._layouts[index].take(small, position, large)
            yield shard


def _row(report: StepReport, busy: float) -> StepRow:
    seconds = report.seconds
    return StepRow(
        report.loss,
        report.step,
        report.lr,
        report.grad_norm,
        report.skipped,
        report.loss_scale,
        seconds.compute,
        seconds.all_reduce,
        seconds.optimizer,
        busy,
    )
