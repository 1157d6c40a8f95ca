"""The state of a model's ranks: put together from their answers, and taken apart for the ranks of a new group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradwire_proto.codec import encode_variant
from gradwire_proto.values import BatchShapes, ModelState, SplitDecision, Variant

Fields = Mapping[str, Any]


def model_state(
    whole: Fields,
    held: Sequence[Any],
    *,
    decisions: Mapping[str, SplitDecision],
    opened: Sequence[Variant],
    threads: int,
    kernels: Sequence[BatchShapes] = (),
) -> ModelState:
    """whole: the answer of a rank that was asked for everything. held: each rank's part of the held gradients.

    opened: the variants that an architecture has made. The command's number is left 0.
    """
    written = whole["written"]
    return ModelState(
        tensors=whole["tensors"],
        optimizer=whole["optimizer"],
        step=whole["step"],
        command=0,
        trained=tuple(whole["trained"]),
        held=tuple(held),
        splits={
            name: replace(each, written=tuple(written[name])) if name in written else each
            for name, each in decisions.items()
        },
        opened=tuple(opened),
        threads=threads,
        kernels=tuple(kernels),
    )


def for_rank(state: ModelState, rank: int, size: int) -> dict[str, Any]:
    """What one of `size` ranks needs of the state, beside the tensors, as fields of a message.

    A group of another size than the one that was saved holds all parts of the held gradients on its first rank.
    """
    held = None
    if any(parts is not None for parts in state.held):
        mine = state.held[rank : rank + 1] if len(state.held) == size else state.held if rank == 0 else ()
        held = [parts or {} for parts in mine]
    weights = {name: each.weight for name, each in state.splits.items() if each.weight is not None}
    return {
        "optimizer": state.optimizer,
        "step": state.step,
        "trained": state.trained,
        "held": held,
        "weights": weights if size > 1 else {},
        "opened": [(encode_variant(each).SerializeToString(), _written(state, each)) for each in state.opened],
    }


def _written(state: ModelState, variant: Variant) -> tuple[str, ...] | None:
    decision = state.splits.get(variant.name)
    return None if decision is None else decision.written
