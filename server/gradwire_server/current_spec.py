"""The spec of a model as it is now: what it was made from, and what has been changed since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from gradwire_proto import codec
from gradwire_proto.encoding.scalar_codec import decode_time, encode_time
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import ArchitectureSpec, ModelSpec, ModelUpdate, OptimizerSpec, StateTensor, Variant


class CurrentSpec:
    """Follows a model's commands, so that ranks that start anew can be given the same model.

    `created_at`: when the model was made, in seconds since 1970.
    """

    def __init__(self, spec: ModelSpec, created_at: float) -> None:
        self.value = spec
        self.created_at = created_at
        self._encoded: bytes | None = None

    @classmethod
    def decode(cls, raw: bytes) -> CurrentSpec:
        """The spec that `encoded` wrote."""
        message = model_pb2.Model.FromString(raw)
        created_at = decode_time(message.create_time)
        message.ClearField("create_time")
        return cls(codec.decode_model_spec(message), created_at)

    def encoded(self) -> bytes:
        """The spec with all graphs, and when the model was made."""
        if self._encoded is None:
            message = codec.encode_model_spec(self.value)
            encode_time(self.created_at, message.create_time)
            self._encoded = message.SerializeToString()
        return self._encoded

    def updated(self, update: ModelUpdate) -> None:
        """Settings were changed. Which parameters are trained is no part of the spec: it stays what it was at first."""
        labels = self.value.labels if update.labels is None else update.labels
        self._change(replace(self.value, optimizer=updated_optimizer(self.value.optimizer, update), labels=labels))

    def add_variant(self, variant: Variant, tensors: Sequence[StateTensor], operators: Mapping[str, str]) -> None:
        """The program has another variant, further constants, and names further operators."""
        program = self.value.program
        assert not isinstance(program, ArchitectureSpec), "an architecture takes no variants"
        program = replace(
            program,
            variants=(*program.variants, variant),
            tensors=(*program.tensors, *tensors),
            operators={**program.operators, **operators},
        )
        self._change(replace(self.value, program=program))

    def _change(self, spec: ModelSpec) -> None:
        self.value = spec
        self._encoded = None


def updated_optimizer(optimizer: OptimizerSpec | None, update: ModelUpdate) -> OptimizerSpec | None:
    """The optimizer of a model after an update."""
    optimizer = update.optimizer or optimizer
    if optimizer is None or update.lr is None:
        return optimizer
    return optimizer.with_learning_rate(update.lr)


def trained_only(tensors: Sequence[StateTensor], trained: Sequence[str]) -> tuple[StateTensor, ...]:
    """`tensors`, those of the names `trained`, and their aliases, trained and no others."""
    names = frozenset(trained)
    return tuple(replace(each, requires_grad=(each.alias_of or each.name) in names) for each in tensors)
