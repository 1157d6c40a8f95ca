"""Training steps as one message to each rank: what they have in common once, and each one's numbers and bytes.

Of the message's fields, `layouts` is JSON: those of the shards. `steps` is JSON, too: for each step the layout that it
has, the number of its command, its number among the ranks' commands and its learning rate. `data` is a list of buffers:
the first holds all small tensors of the steps, one after another, each at a multiple of 64 bytes; each other one is a
large tensor. Where there is a `region` of StepMemory, it holds all tensors, as the first buffer holds the small ones.
`part_seconds`, `part_row` and `follows`: see RankServer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire_proto.batch_form import BatchForm, FormedStep
from gradwire_proto.values import Segment, TensorData
from gradwire_workers.frames import Encoded, Frame, frame_at, to_json
from gradwire_workers.shard import Shard, shard_fields
from gradwire_workers.step_memory import Region, StepMemory

SMALL_BYTES = 16 << 10
"""Tensors with fewer bytes travel together: a frame of its own costs more than the copy."""

PART_SECONDS = 0.005
"""A rank answers in parts: what it has applied when so much time has passed since the last part."""

ALIGNMENT = 64
"""Small tensors begin at multiples of so many bytes, as torch's own do."""

_MOST_KNOWN = 256

_PADDING = bytes(ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Part:
    """Which bytes of a batch's tensors are one of a shard's: tensor `index`, `start` to `stop`; None: all."""

    index: int
    start: int | None
    stop: int | None


class Layout:
    """How the ranks' shards of all batches of one form look. `rows`: of the batch; `rank_rows`: of each shard."""

    def __init__(self, form: BatchForm, shards: Sequence[Shard], rows: int) -> None:
        self.form = form
        self.variant = shards[0].variant
        self.rows = rows
        self.rank_rows = tuple(shard.count for shard in shards)
        self.shards = [to_json(described(shard)) for shard in shards]
        """In JSON."""
        self.parts = [_parts_of(shard, form) for shard in shards]


class Layouts:
    """The layouts of batches that have come, by their forms. `make`: a new one; None where a batch must go alone."""

    def __init__(self, make: Callable[[BatchForm], Layout | None]) -> None:
        self._make = make
        self._known: dict[BatchForm, Layout] = {}
        self._variants = 0

    def of_first(self, steps: Sequence[FormedStep], variants: int) -> list[Layout]:
        """Those of the first steps, up to one that must go alone. `variants`: how many the model has now."""
        if variants != self._variants or len(self._known) > _MOST_KNOWN:
            self._known, self._variants = {}, variants
        found: list[Layout] = []
        for step in steps:
            layout = self._known.get(step.form)
            if layout is None:
                layout = self._make(step.form)
                if layout is None:
                    break
                self._known[step.form] = layout
            found.append(layout)
        return found


def described(shard: Shard) -> dict[str, Any]:
    """A shard as plain values, without its tensors' bytes."""
    fields = shard_fields(shard)
    return fields | {name: [_leaf(each) for each in fields[name]] for name in ("inputs", "targets")}


def _leaf(leaf: Any) -> list[Any]:
    return ["tensor", leaf.dtype, leaf.shape] if isinstance(leaf, TensorData) else ["constant", leaf]


def _parts_of(shard: Shard, form: BatchForm) -> list[_Part]:
    parts = []
    for leaf in (*shard.inputs, *shard.targets):
        if isinstance(leaf, TensorData):
            assert isinstance(leaf.data, Segment)
            index, start, nbytes = int(leaf.data.path), leaf.data.offset, leaf.data.nbytes
            is_whole = nbytes == form.sizes[index]
            parts.append(_Part(index, None, None) if is_whole else _Part(index, start, start + nbytes))
    return parts


def pack_steps(
    steps: Sequence[FormedStep],
    layouts: Sequence[Layout],
    *,
    rank: int,
    command: int,
    number: int,
    follows: bool = False,
    memory: StepMemory | None = None,
) -> tuple[Encoded, Region | None]:
    """The fields of one rank's message. `layouts`: each step's. command, number: the first step's; they count up.

    follows: whether the rank may still be at the message before, which the steps are behind. memory: where the steps'
    tensors may lie; then they are in the region that is returned until the rank has answered.
    """
    # Several ranks tell of each step at once: when one is lost, the others should not be further than is known.
    part_seconds = PART_SECONDS if len(layouts[0].shards) == 1 else 0.0
    used: dict[int, int] = {}
    described: list[str] = []
    rows: list[str] = []
    buffers: list[Any] = []
    for offset, (step, layout) in enumerate(zip(steps, layouts, strict=True)):
        where = used.get(id(layout))
        if where is None:
            where = used[id(layout)] = len(described)
            described.append(layout.shards[rank])
        lr = "null" if step.lr is None else to_json(step.lr)
        rows.append(f"[{where},{command + offset},{number + offset},{lr}]")
        for part in layout.parts[rank]:
            data = step.data[part.index]
            if part.start is not None:
                data = memoryview(data).cast("B")[part.start : part.stop]
            buffers.append(data)
    region = None if memory is None else memory.place(_aligned(buffers))
    # Half of them early: what is done about these, and the next message, is done while the rank computes the rest.
    part_row = (len(steps) + 1) // 2 if len(steps) > 1 else 0
    frames: list[Frame] = [f"[{','.join(described)}]".encode(), f"[{','.join(rows)}]".encode()]
    if region is None:
        frames.append(b"".join(_aligned([each for each in buffers if len(each) < SMALL_BYTES])))
        frames += [each for each in buffers if len(each) >= SMALL_BYTES]
    data = ",".join([frame_at(index) for index in range(3, len(frames) + 1)])
    text = (
        f'{{"layouts":{frame_at(1)},"steps":{frame_at(2)},"data":[{data}],"region":{to_json(region)},'
        f'"part_seconds":{part_seconds},"part_row":{part_row},"follows":{"true" if follows else "false"}}}'
    )
    # Made by hand: it is on the way of each step, and `pack` takes several times as long.
    return Encoded(text, frames), region


def _aligned(buffers: Sequence[Frame]) -> list[Frame]:
    """These, and bytes between them so that each begins at a multiple of ALIGNMENT."""
    parts: list[Frame] = []
    for each in buffers:
        parts.append(each)
        if rest := -len(each) % ALIGNMENT:
            parts.append(_PADDING[:rest])
    return parts
