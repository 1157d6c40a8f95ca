"""What refuses a batch of a fit, as an error of the fit: it says which batch, and what stays applied."""

from __future__ import annotations

from typing import Any

from gradwire_proto.errors import GradwireError


def step_refusal(error: GradwireError, step: int, per_epoch: int) -> GradwireError:
    """Of a step of the fit, which has so many in each epoch."""
    epoch, position = divmod(step, per_epoch)
    return _refusal(error, "dataset", f"epoch {epoch}, batch {position} (step {step} of the fit)", step)


def evaluation_refusal(error: GradwireError, epoch: int, done: int) -> GradwireError:
    """Of the validation after an epoch, and so many steps in all. The error itself names the batch."""
    return _refusal(error, "validation_dataset", f"validation after epoch {epoch}", done)


def _refusal(error: GradwireError, dataset: str, where: str, done: int) -> GradwireError:
    """Those that are not about a batch are as they are."""
    field = error.field or ""
    if not field.startswith("batch"):
        return error
    attributes: dict[str, Any] = error.attributes() | {"field": f"{dataset}{field.removeprefix('batch')}"}
    attributes["outcome"] = "applied" if done else error.outcome
    return type(error)(f"{where}: {error.message}; the {done} steps before it were applied", **attributes)
