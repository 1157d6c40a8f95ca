"""A model as clients see it, kept current by whoever hosts it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from gradwire_proto.errors import FailedPrecondition, GradwireError, RankLost
from gradwire_proto.names import model_name
from gradwire_proto.values import (
    ArchitectureSpec,
    ModelInfo,
    ModelSpec,
    ModelUpdate,
    Sharding,
    StateTensor,
    Variant,
)


class ModelDescription:
    """What is known of one model: first "creating", then "ready", in the end "failed" or "deleting".

    `operators` are the schemas of all operators that its program names; `has_failed` stays true while it is deleted.
    """

    def __init__(self, model_id: str, spec: ModelSpec) -> None:
        self.has_failed = False
        graphs = None if isinstance(spec.program, ArchitectureSpec) else spec.program
        self.operators = dict(graphs.operators) if graphs else {}
        self._info = ModelInfo(
            id=model_id,
            state="creating",
            step=0,
            workers=spec.workers,
            sharding=None,
            num_parameters=_count_parameters(graphs.tensors) if graphs else 0,
            optimizer=spec.optimizer,
            loss=spec.loss,
            labels=spec.labels,
            created_at=time.time(),
            device=spec.device,
            seed=spec.seed,
            on_nan=spec.on_nan,
            tensors=graphs.tensors if graphs else (),
            variants=tuple(map(_without_graphs, graphs.variants)) if graphs else (),
            clip_grad_norm=spec.clip_grad_norm,
            clip_grad_value=spec.clip_grad_value,
            precision=spec.precision,
            architecture=spec.program.name if isinstance(spec.program, ArchitectureSpec) else None,
            loss_reduction=spec.loss_reduction,
        )

    @property
    def info(self) -> ModelInfo:
        """The whole description."""
        return self._info

    @property
    def brief(self) -> ModelInfo:
        """The description without tensors and variants, for lists."""
        return replace(self._info, tensors=(), variants=())

    @property
    def name(self) -> str:
        """`models/{id}`."""
        return model_name(self._info.id)

    def ready(self, sharding: Sharding, device: str) -> None:
        """The ranks have the model."""
        self._info = replace(self._info, state="ready", sharding=sharding, device=device)

    def built(self, tensors: Sequence[StateTensor], variants: Sequence[Variant]) -> None:
        """The ranks have built the module that the client named, which has these."""
        self._info = replace(
            self._info,
            tensors=tuple(tensors),
            variants=tuple(variants),
            num_parameters=_count_parameters(tensors),
        )

    def deleting(self) -> None:
        """The model is on its way out, whatever it was."""
        self._info = replace(self._info, state="deleting")

    def applied(self, result: Any) -> None:
        """A command was applied. `result` may tell the step that the model is at and the rows that ranks computed."""
        step = result if isinstance(result, int) else getattr(result, "step", self._info.step)
        rank_rows = getattr(result, "rank_rows", ()) or self._info.rank_rows
        self._info = replace(self._info, step=step, rank_rows=rank_rows)

    def met(self, error: GradwireError) -> None:
        """A command failed. Where nobody knows what it left behind, so did the model."""
        self.has_failed |= isinstance(error, RankLost) or error.outcome == "unknown"
        state = "failed" if self.has_failed and self._info.state == "ready" else self._info.state
        self._info = replace(self._info, state=state, last_error=str(error))

    def updated(self, update: ModelUpdate, trained: Sequence[str] | None) -> None:
        """Settings were changed. `trained`: names of the parameters that are trained now, None where none changed."""
        info = self._info
        optimizer = update.optimizer or info.optimizer
        if optimizer is not None and update.lr is not None:
            optimizer = optimizer.with_learning_rate(update.lr)
        tensors = info.tensors
        if trained is not None:
            names = frozenset(trained)
            tensors = tuple(replace(each, requires_grad=(each.alias_of or each.name) in names) for each in tensors)
        labels = info.labels if update.labels is None else update.labels
        self._info = replace(info, optimizer=optimizer, tensors=tensors, labels=labels)

    def add_variant(self, variant: Variant, tensors: Sequence[StateTensor], operators: Mapping[str, str]) -> None:
        """The program has another variant, further constants, and names further operators."""
        self.operators.update(operators)
        info = self._info
        self._info = replace(
            info, variants=(*info.variants, _without_graphs(variant)), tensors=(*info.tensors, *tensors)
        )

    def check_usable(self) -> None:
        """Raise FailedPrecondition unless the model is ready."""
        state = self._info.state
        if state == "ready":
            return
        if state == "failed":
            raise FailedPrecondition(
                f"{self.name} has failed and must be deleted; it failed with: {self._info.last_error}",
                reason="MODEL_FAILED",
            )
        if state == "creating":
            raise FailedPrecondition(
                f"{self.name} is still being created", reason="MODEL_NOT_READY", retryable=True, retry_after=0.1
            )
        raise deleted(self.name)


def deleted(name: str) -> FailedPrecondition:
    """The error of requests that come, or wait, while the model is deleted."""
    return FailedPrecondition(f"{name} is being deleted; nothing was applied", reason="MODEL_DELETED")


def _count_parameters(tensors: Sequence[StateTensor]) -> int:
    return sum(prod(t.shape) for t in tensors if t.role == "parameter" and t.alias_of is None)


def _without_graphs(variant: Variant) -> Variant:
    return replace(variant, graph=None, loss_graph=None, weight_graph=None)
