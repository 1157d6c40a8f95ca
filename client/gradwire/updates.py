"""What `Model.update` is asked for, from what users pass; and what `create_model` is given alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradwire.arguments import as_bool, as_mapping, as_text
from gradwire.errors import InvalidArgument
from gradwire.optim import Optimizer
from gradwire.optim.checks import check_not_negative
from gradwire_proto.values import ModelUpdate, OptimizerSpec


def model_update(*, lr: Any, optimizer: Any, trainable: Any, labels: Any) -> ModelUpdate:
    """The update of these arguments. InvalidArgument for one that is of another type than `Model.update` says."""
    if lr is not None:
        check_not_negative(lr, field="lr", words="learning rate")
    given = {} if trainable is None else as_mapping(trainable, "trainable")
    return ModelUpdate(
        trainable=tuple((pattern, as_bool(value, f'trainable["{pattern}"]')) for pattern, value in given.items()),
        optimizer=as_optimizer(optimizer),
        lr=None if lr is None else float(lr),
        labels=None if labels is None else as_labels(labels, "labels"),
    )


def as_optimizer(optimizer: Any) -> OptimizerSpec | None:
    """The spec of an optimizer, None for none."""
    if optimizer is None:
        return None
    if not isinstance(optimizer, Optimizer):
        message = f"expected a spec such as gradwire.optim.SGD(lr=0.1), got {type(optimizer).__qualname__}"
        raise InvalidArgument(message, field="optimizer", reason="OPTIMIZER_UNKNOWN")
    return optimizer.spec()


def as_labels(labels: Any, field: str) -> Mapping[str, str]:
    """Labels, whose values are texts as their names are."""
    return {key: as_text(value, f'{field}["{key}"]') for key, value in as_mapping(labels, field).items()}
