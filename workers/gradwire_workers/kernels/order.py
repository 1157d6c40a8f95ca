"""What is to be compiled: all that a process needs to know that has none of a rank's state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.codec import encode_model_spec
from gradwire_proto.values import Limits, ModelSpec
from gradwire_workers.shard import Shard
from gradwire_workers.training.replica import Replica

_FORMAT = 3
"""Goes up when other kernels are made of the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOrder:
    """A pass over shards of one shape, and where it is to run. The same order gives the same kernels.

    spec: the raw message gradwire.v1.Model of a model with this one variant. rows: the loss is to be divided by what
    all ranks' rows weigh. inputs, targets: for each leaf its type and shape, or a constant alone. tensors: name, type,
    shape and strides of each of the program's. threads: torch's.
    """

    spec: bytes
    variant: str
    rows: bool
    inputs: tuple[tuple[Any, ...], ...]
    targets: tuple[tuple[Any, ...], ...]
    tensors: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...]], ...]
    trained: tuple[str, ...]
    device: str
    threads: int
    limits: Limits

    @property
    def digest(self) -> str:
        """In hexadecimal digits: of the order, and of the torch and the kind of processor that carry it out."""
        machine = (_FORMAT, torch.__version__, torch.backends.cpu.get_cpu_capability())
        return hashlib.sha256(self.spec + self._text.encode() + repr(machine).encode()).hexdigest()

    @property
    def _text(self) -> str:
        return json.dumps({**{name: getattr(self, name) for name in _WORDS}, "limits": asdict(self.limits)})

    def encode(self) -> bytes:
        """For `decode`: the length of some JSON in 8 bytes, the JSON, and the spec."""
        text = self._text.encode()
        return len(text).to_bytes(8, "little") + text + self.spec

    @classmethod
    def decode(cls, content: bytes) -> CompileOrder:
        """What `encode` gave."""
        end = 8 + int.from_bytes(content[:8], "little")
        words = json.loads(content[8:end])
        leaves = {name: tuple(map(tuple, words[name])) for name in ("inputs", "targets")}
        tensors = tuple((name, dtype, tuple(shape), tuple(stride)) for name, dtype, shape, stride in words["tensors"])
        fields = {**words, **leaves, "tensors": tensors, "trained": tuple(words["trained"])}
        return cls(spec=content[end:], **{**fields, "limits": Limits(**words["limits"])})


_WORDS = ("variant", "rows", "inputs", "targets", "tensors", "trained", "device", "threads")


def order_of(
    replica: Replica, spec: ModelSpec, trained: Sequence[str], shard: Shard, *, limits: Limits
) -> CompileOrder:
    """The order for the passes of a rank's model over shards like this one, whose tensors may be on any device."""
    program = replica.graphs.program
    variants = tuple(each for each in program.variants if each.name == shard.variant)
    # Nothing that the pass does not depend on: the same passes of other models have the same kernels.
    bare = replace(
        ModelSpec(program=replace(program, variants=variants), loss=spec.loss),
        precision=spec.precision,
        deterministic=spec.deterministic,
        loss_reduction=spec.loss_reduction,
    )
    return CompileOrder(
        spec=encode_model_spec(bare).SerializeToString(deterministic=True),
        variant=shard.variant,
        rows=replica.groups is not None and not shard.whole,
        inputs=tuple(map(_described, shard.inputs)),
        targets=tuple(map(_described, shard.targets)),
        tensors=tuple(
            (name, _dtype(each), tuple(each.shape), tuple(each.stride()))
            for name, each in replica.program.all_state().items()
        ),
        trained=tuple(trained),
        device=replica.device.type,
        threads=torch.get_num_threads(),
        limits=limits,
    )


def _described(leaf: Any) -> tuple[Any, ...]:
    return (_dtype(leaf), tuple(leaf.shape)) if isinstance(leaf, Tensor) else (leaf,)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
