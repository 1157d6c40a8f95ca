"""What a Trainer computes of a shard, as the fields of a rank's answer. Not asdict: it would copy the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwire_proto.values import DerivativeQuery, GradientQuery
from gradwire_workers.rank_tensors import incoming, leaves_in, shard_in
from gradwire_workers.trainer import Trainer

Fields = Mapping[str, Any]


def gradients_of(trainer: Trainer, fields: Fields) -> Fields:
    """Gradients of a model, or of a function."""
    query = GradientQuery(**fields["query"])
    vectors = incoming(fields.get("vectors") or {})
    report = trainer.compute_gradients(shard_in(fields), query, command=fields["command"], vectors=vectors)
    return {
        "loss": report.loss,
        "step": report.step,
        "rows": report.rows,
        "gradients": report.gradients,
        "input_gradients": report.input_gradients,
        "outputs": report.outputs,
        "seconds": report.seconds._asdict(),
    }


def derivatives_of(trainer: Trainer, fields: Fields) -> Fields:
    """Derivatives of a function."""
    query = DerivativeQuery(**fields["query"])
    report = trainer.differentiate(shard_in(fields), query, leaves_in(fields["vectors"]))
    return {
        "outputs": report.outputs,
        "derivatives": report.derivatives,
        "rows": report.rows,
        "seconds": report.seconds._asdict(),
    }
