"""What many batches have in common: how they are nested, their constants, and the types and shapes of their tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from gradwire_proto.values import Batch, Handle, Segment, TensorData, Value


class BatchForm:
    """A batch without its tensors' bytes. Two batches have the same form where `form_of` gives the same key."""

    __slots__ = ("_inputs", "_targets", "sizes")

    def __init__(self, batch: Batch) -> None:
        found: list[TensorData] = []
        self._inputs = _numbered(batch.inputs, found)
        self._targets = _numbered(batch.targets, found)
        self.sizes = tuple(each.nbytes for each in found)
        """Bytes of each tensor."""

    @property
    def numbered(self) -> Batch:
        """The batch with a Segment in place of each tensor's bytes, whose path is the tensor's number: for cutting."""
        return Batch(self._inputs, self._targets)

    def batch(self, data: Sequence[Any]) -> Batch:
        """The batch of this form whose tensors have these bytes, in the order in which `form_of` gives them."""
        return Batch(_filled(self._inputs, data), _filled(self._targets, data))


@dataclass(frozen=True, slots=True)
class FormedStep:
    """A training step: the form of its batch, its tensors' bytes in order, and the learning rate of its update."""

    form: BatchForm
    data: Sequence[Any]
    lr: float | None


def form_of(batch: Batch) -> tuple[Hashable, list[Any]] | None:
    """(a key of the batch's form, its tensors' bytes in order); None where a tensor's bytes are not in the batch."""
    data: list[Any] = []
    try:
        return (_key(batch.inputs, data), _key(batch.targets, data)), data
    except _Elsewhere:
        return None


class _Elsewhere(Exception):
    """A tensor's bytes lie in a segment, or are named by a handle."""


def _key(value: Any, data: list[Any]) -> Hashable:
    if isinstance(value, TensorData):
        if isinstance(value.data, (Segment, Handle)):
            raise _Elsewhere
        data.append(value.data)
        return value.dtype, value.shape
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_key(item, data) for item in value)
    if isinstance(value, dict):
        return dict, tuple((name, _key(item, data)) for name, item in value.items())
    # repr: NaN equals itself, and True is not 1.
    return type(value), repr(value)


def _numbered(value: Any, found: list[TensorData]) -> Any:
    """The value with TensorData that hold their position in place of bytes."""
    if isinstance(value, TensorData):
        found.append(value)
        return TensorData(value.dtype, value.shape, Segment(str(len(found) - 1), 0, value.nbytes))
    if isinstance(value, (tuple, list)):
        return type(value)(_numbered(item, found) for item in value)
    if isinstance(value, dict):
        return {name: _numbered(item, found) for name, item in value.items()}
    return value


def _filled(value: Any, data: Sequence[Any]) -> Value:
    if isinstance(value, TensorData):
        assert isinstance(value.data, Segment)
        return TensorData(value.dtype, value.shape, data[int(value.data.path)])
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(item, data) for item in value)
    if isinstance(value, dict):
        return {name: _filled(item, data) for name, item in value.items()}
    return value
