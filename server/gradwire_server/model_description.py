"""A model as clients see it, kept current by whoever hosts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from gradwire_proto.errors import FailedPrecondition, GradwireError, Unavailable
from gradwire_proto.names import model_name
from gradwire_proto.values import (
    ArchitectureSpec,
    CompiledKernels,
    ModelInfo,
    ModelSpec,
    ModelUpdate,
    Sharding,
    StateTensor,
    Variant,
)
from gradwire_server.current_spec import CurrentSpec, trained_only, updated_optimizer


class ModelDescription:
    """What is known of one model: first "creating", "waiting" or "recovering", then "ready", in the end "failed" or
    "deleting".

    A model that was restored, and whose spec has not been read yet, has only an id. `operators` are the schemas of all
    operators that its program names; `has_failed` stays true while it is deleted; `made_by` is the id of the request
    that created the model, None where it had none.
    """

    def __init__(self, model_id: str, spec: ModelSpec | None, created_at: float | None = None) -> None:
        self.has_failed = False
        self.made_by: str | None = None
        self.operators: dict[str, str] = {}
        self._results: Sequence[Any] = ()
        """Of the last command that was applied, as long as nobody has asked."""
        self._spec: CurrentSpec | None = None
        self._shown: ModelInfo | None = None
        self._settled_step: int | None = None
        """The step of the last command that outlives what it should; None where all do."""
        self._unsettled = 0
        created_at = time.time() if created_at is None else created_at
        if spec is None:
            self._info = ModelInfo(
                id=model_id,
                state="recovering",
                step=0,
                workers=0,
                sharding=None,
                num_parameters=0,
                optimizer=None,
                loss=None,
                labels={},
                created_at=created_at,
                durability="process",
            )
        else:
            self._begin(model_id, CurrentSpec(spec, created_at), "creating")

    def _begin(self, model_id: str, current: CurrentSpec, state: str) -> None:
        spec = current.value
        graphs = None if isinstance(spec.program, ArchitectureSpec) else spec.program
        self.operators = dict(graphs.operators) if graphs else {}
        self._spec = current
        self._info = ModelInfo(
            id=model_id,
            state=state,
            step=0,
            workers=spec.workers,
            sharding=None,
            num_parameters=_count_parameters(graphs.tensors) if graphs else 0,
            optimizer=spec.optimizer,
            loss=spec.loss,
            labels=spec.labels,
            created_at=current.created_at,
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
            durability=spec.durability,
            checkpoint_every=spec.checkpoint_every,
            keep_checkpoints=spec.keep_checkpoints,
            deterministic=spec.deterministic,
            sync_batch_norm=spec.sync_batch_norm,
            compile=spec.compile,
        )

    @property
    def spec(self) -> CurrentSpec:
        """The spec as it is now."""
        assert self._spec is not None, "the spec has been read"
        return self._spec

    @property
    def info(self) -> ModelInfo:
        """The whole description, as of the last command that the ranks have."""
        return self._info

    @property
    def shown(self) -> ModelInfo:
        """The whole description for clients: as of the last command, also while ranks are brought back to it.

        The step is that of the last one that outlives what it should.
        """
        shown = self._info
        if self._shown is not None:
            shown = replace(self._shown, state=self._info.state, last_error=self._info.last_error)
        return shown if self._settled_step is None else replace(shown, step=self._settled_step)

    @property
    def brief(self) -> ModelInfo:
        """The description without tensors and variants, for lists."""
        return replace(self.shown, tensors=(), variants=())

    @property
    def name(self) -> str:
        """`models/{id}`."""
        return model_name(self._info.id)

    def recovering(self) -> None:
        """The ranks are lost, and others will take their place. A model that is deleted stays so."""
        if self._info.state == "ready":
            self._shown = self._info
            self._info = replace(self._info, state="recovering")

    def goes_back_to(self, spec: CurrentSpec, step: int) -> None:
        """What follows is applied to a checkpoint of the model, which has this spec."""
        state, last_error = self._info.state, self._info.last_error
        self._begin(self._info.id, spec, state)
        self._info = replace(self._info, step=step, last_error=last_error)

    def waits_for(self, words: str) -> None:
        """It is to be made, and waits until this is free; "": it waits no more. One that is being deleted stays so."""
        if self._info.state in ("creating", "waiting"):
            self._info = replace(self._info, state="waiting" if words else "creating", waits_for=words)

    @property
    def waits(self) -> bool:
        """Whether it is to be made, and waits until ranks are free."""
        return self._known.state == "waiting"

    def trains(self, names: Sequence[str]) -> None:
        """The parameters of these names are trained, and no others."""
        self._info = replace(self._info, tensors=trained_only(self._info.tensors, names))

    def has_ranks(self, sharding: Sharding, device: str) -> None:
        """Ranks hold the model, or will when commands were applied to them once more."""
        self._info = replace(self._info, sharding=sharding, device=device)

    def ready(self) -> None:
        """The ranks have the model. One that is being deleted stays so."""
        self._shown = None
        if self._info.state in ("creating", "recovering"):
            self._info = replace(self._info, state="ready")

    def built(self, tensors: Sequence[StateTensor], variants: Sequence[Variant]) -> None:
        """The ranks have built the module that the client named, which has these."""
        self._info = replace(
            self._info,
            tensors=tuple(tensors),
            variants=tuple(variants),
            num_parameters=_count_parameters(tensors),
        )

    def compiled(self, kernels: Sequence[CompiledKernels]) -> None:
        """What became of kernels for the shapes that repeat."""
        self._info = replace(self._info, compiled=tuple(kernels))

    def deleting(self) -> None:
        """The model is on its way out, whatever it was."""
        self._info = replace(self._info, state="deleting")

    def applied(self, result: Any) -> None:
        """A command was applied. `result` may tell the step that the model is at and the rows that ranks computed."""
        if not getattr(result, "rank_rows", ()):
            self._info = self._info  # Which it does not tell goes on.
        self._results = (result,)

    @property
    def step(self) -> int:
        """Updates applied, as of the last command that the ranks have."""
        step = self._known.step
        for result in self._results:
            step = result if isinstance(result, int) else getattr(result, "step", step)
        return step

    @property
    def _info(self) -> ModelInfo:
        """As of the last result: put together when it is asked for, which takes longer than most steps may."""
        for result in self._results:
            step = result if isinstance(result, int) else getattr(result, "step", self._known.step)
            rank_rows = getattr(result, "rank_rows", ()) or self._known.rank_rows
            self._known = replace(self._known, step=step, rank_rows=rank_rows)
        self._results = ()
        return self._known

    @_info.setter
    def _info(self, info: ModelInfo) -> None:
        self._known, self._results = info, ()

    def settles(self, settled: asyncio.Future[None] | None, before: int) -> None:
        """The last command outlives what it should once `settled` is done; None: it does. before: the step before."""
        if settled is None:
            return
        if self._settled_step is None:
            self._settled_step = before
        self._unsettled += 1
        settled.add_done_callback(partial(self._settled, self.step))

    def _settled(self, step: int, settled: asyncio.Future[None]) -> None:
        self._unsettled -= 1
        if not settled.cancelled() and settled.exception() is None and self._settled_step is not None:
            self._settled_step = step if self._unsettled else None

    def all_settled(self) -> None:
        """A checkpoint holds the model as it is."""
        self._settled_step = None

    def met(self, error: GradwireError) -> None:
        """A command failed, or ranks were lost."""
        self._info = replace(self._info, last_error=str(error))

    def failed(self, error: GradwireError) -> None:
        """The model cannot be served any more."""
        self.met(error)
        self.has_failed = True
        if self._info.state != "deleting":
            self._info = replace(self._info, state="failed")

    def updated(self, update: ModelUpdate, trained: Sequence[str] | None) -> None:
        """Settings were changed. `trained`: names of the parameters that are trained now, None where none changed."""
        self.spec.updated(update)
        info = self._info
        tensors = info.tensors if trained is None else trained_only(info.tensors, trained)
        labels = info.labels if update.labels is None else update.labels
        optimizer = updated_optimizer(info.optimizer, update)
        self._info = replace(info, optimizer=optimizer, tensors=tensors, labels=labels)

    def add_variant(self, variant: Variant, tensors: Sequence[StateTensor], operators: Mapping[str, str]) -> None:
        """The program has another variant, further constants, and names further operators."""
        self.operators.update(operators)
        self.spec.add_variant(variant, tensors, operators)
        info = self._info
        self._info = replace(
            info, variants=(*info.variants, _without_graphs(variant)), tensors=(*info.tensors, *tensors)
        )

    def check_usable(self) -> None:
        """Raise FailedPrecondition unless the model is ready, or will be without anybody's doing."""
        state = self._known.state
        if state in ("ready", "recovering"):
            return
        if state == "failed":
            durable = self._known.durability != "none"
            kept = ", and the storage keeps it: a restart of the service tries again" if durable else " and is lost"
            raise FailedPrecondition(
                f"{self.name} has failed{kept}; it failed with: {self._known.last_error}",
                reason="MODEL_FAILED",
            )
        if state in ("creating", "waiting"):
            raise not_ready(self.name, self._known.waits_for)
        raise deleted(self.name)


def not_ready(name: str, waits_for: str = "") -> FailedPrecondition:
    """The error of requests that come while the model is made. waits_for: what is not free yet, in words."""
    what = f"waits for {waits_for}" if waits_for else "is still being created"
    return FailedPrecondition(f"{name} {what}", reason="MODEL_NOT_READY", retryable=True, retry_after=0.1)


def recovering(message: str) -> Unavailable:
    """The error of requests that do not wait for a model that is brought back; nothing was applied."""
    return Unavailable(message, reason="MODEL_RECOVERING", retry_after=0.2)


def deleted(name: str) -> FailedPrecondition:
    """The error of requests that come, or wait, while the model is deleted."""
    return FailedPrecondition(f"{name} is being deleted; nothing was applied", reason="MODEL_DELETED")


def _count_parameters(tensors: Sequence[StateTensor]) -> int:
    return sum(prod(t.shape) for t in tensors if t.role == "parameter" and t.alias_of is None)


def _without_graphs(variant: Variant) -> Variant:
    return replace(variant, graph=None, loss_graph=None, weight_graph=None)
