"""Losses of torch.nn.functional by name, and how each is a weighted sum over rows.

A sum over rows can be computed rank by rank: every rank sums over its rows, and divides by the weight of all of them.
A loss that is no such sum, or not for the shapes at hand, is computed on the gathered batch instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import to_torch
from gradwire_proto.values import TensorData, TorchLossSpec
from gradwire_workers.training.option_check import Check, Number, OneOf, check_options

Weight = Tensor | float
"""What a rank's rows add to the number that the whole loss is divided by."""


@dataclass(frozen=True, kw_only=True)
class RowSum:
    """A loss over a rank's rows: their sum, and their weight. `weight` None: nothing is divided."""

    total: Tensor
    weight: Weight | None


class NamedLoss:
    """A loss of torch.nn.functional over one output and one target. Its options are checked when it is made.

    Raises InvalidArgument: LOSS_UNKNOWN, OPTION_UNKNOWN, OPTION_OUT_OF_RANGE, LOSS_NOT_SCALAR.
    """

    def __init__(self, spec: TorchLossSpec, device: torch.device, *, field: str = "model.loss.torch") -> None:
        known = _LOSSES.get(spec.name)
        if known is None:
            raise InvalidArgument(
                f"unknown loss {spec.name[:80]!r}; expected one of {', '.join(_LOSSES)}",
                field=f"{field}.name",
                reason="LOSS_UNKNOWN",
            )
        self.name = spec.name
        self._known = known
        self._function: Callable[..., Tensor] = getattr(F, spec.name)
        if spec.options.get("reduction") == "none":
            raise InvalidArgument(
                "'none' gives no single number to differentiate; expected 'mean' or 'sum'",
                field=f'{field}.options["reduction"]',
                reason="LOSS_NOT_SCALAR",
            )
        self.looks_at_targets = True
        """Whether classes are checked that the output may not have: whoever does not ask for it has checked them."""
        check_options(spec.options, known.options, field=f"{field}.options", owner=f"torch.nn.functional.{spec.name}")
        self._options: dict[str, Any] = {
            name: to_torch(value, writable=True).to(device) if isinstance(value, TensorData) else value
            for name, value in spec.options.items()
        }
        self._has_classes = known.weight is _class_weight
        # What torch.nn.functional calls in the end, where nothing is left to broadcast.
        self._direct: Callable[..., Tensor] | None = _DIRECT.get(spec.name)
        self._reduction = 2 if spec.options.get("reduction") == "sum" else 1

    def whole(self, output: Tensor, target: Tensor) -> Tensor:
        """The loss over all rows."""
        if self._direct is not None and output.shape == target.shape:
            return self._direct(output, target, self._reduction)
        self.check(output, target)
        return self._call(output, target, self._options)

    def over_rows(self, output: Tensor, target: Tensor) -> RowSum | None:
        """The loss over some of the rows; None where it is no sum over rows."""
        self.check(output, target)
        weight = self._weight(output, target)
        if weight is None:
            return None
        total = self._call(output, target, {**self._options, "reduction": "sum"})
        return RowSum(total=total, weight=None if self._options.get("reduction") == "sum" else weight)

    def weight(self, output: Tensor, target: Tensor) -> Weight | None:
        """The weight of `over_rows`, for a loss that is such a sum. Of the output, type and shape are looked at."""
        return None if self._options.get("reduction") == "sum" else self._weight(output, target)

    def _weight(self, output: Tensor, target: Tensor) -> Weight | None:
        if self._known.weight is None or output.dim() == 0 or output.shape[:1] != target.shape[:1]:
            return None
        if output.dtype is torch.float16:
            return None  # a sum over rows reaches its largest number soon
        return self._known.weight(output, target, self._options)

    def _call(self, output: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
        return self._function(output, target, **options)

    def check(self, output: Tensor, target: Tensor) -> None:
        """Refuse classes that the output has not; of the output, its dimensions behind the rows are looked at."""
        # Under vmap nothing can look at values: whoever uses that has checked before.
        if self.looks_at_targets and self._has_classes and not is_functorch_wrapped_tensor(target):
            check_classes(output, target, self._options)


def check_classes(output: Tensor, target: Tensor, options: Mapping[str, Any]) -> None:
    """Refuse a class that the output has not: on CUDA, torch's own check breaks the process."""
    if target.is_floating_point() or target.numel() == 0 or output.dim() == 0:
        return
    classes = output.shape[1 if output.dim() > 1 else 0]
    taken = target != options.get("ignore_index", -100)
    wrong = taken & ((target < 0) | (target >= classes))
    if wrong.any():
        raise InvalidArgument(
            f"target {int(target[wrong][0])} is out of range: expected classes in [0, {classes})",
            field="batch.targets",
            reason="TARGET_OUT_OF_RANGE",
        )


# --- weights: what the mean over these rows is divided by; None: no sum over rows ---------------------------------


def _element_weight(output: Tensor, target: Tensor, options: Mapping[str, Any]) -> Weight | None:
    """Losses that are a mean over elements. Broadcasting would mix rows."""
    if output.shape != target.shape or not _fits_each_row(options.get("weight"), output):
        return None
    if not _fits_each_row(options.get("pos_weight"), output):
        return None
    return float(output.numel())


def _divergence_weight(output: Tensor, target: Tensor, options: Mapping[str, Any]) -> Weight | None:
    """kl_div: a mean over elements, or with "batchmean" over rows."""
    if output.shape != target.shape:
        return None
    return float(output.shape[0] if options.get("reduction") == "batchmean" else output.numel())


def _class_weight(output: Tensor, target: Tensor, options: Mapping[str, Any]) -> Weight | None:
    """cross_entropy and nll_loss: the class weights of targets that are not ignored, or the number of distributions."""
    if output.dim() < 2:
        return None
    if target.is_floating_point():
        return float(output.numel() // output.shape[1]) if output.shape == target.shape else None
    taken = target != options.get("ignore_index", -100)
    weight = options.get("weight")
    if weight is None:
        return taken.sum()
    return weight[target.where(taken, 0)].where(taken, 0).sum()


def _fits_each_row(weight: Tensor | None, output: Tensor) -> bool:
    return weight is None or weight.dim() < output.dim() or weight.shape[0] == 1


# Their only option is how they are reduced: 1 stands for the mean, 2 for the sum, as in torch.nn._reduction.
_NN: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
_DIRECT: Mapping[str, Callable[..., Tensor]] = {"mse_loss": _NN.mse_loss, "l1_loss": _NN.l1_loss}


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Loss:
    options: Mapping[str, Check]
    weight: Callable[[Tensor, Tensor, Mapping[str, Any]], Weight | None] | None = None


def _tensor(value: Any) -> str | None:
    return None if value is None or isinstance(value, TensorData) else "a tensor"


_FLAG = OneOf((False, True))
_REDUCTION = {"reduction": OneOf(("mean", "sum"))}
_WEIGHT = {"weight": _tensor}
_IGNORE = {"ignore_index": Number(whole=True)}

_LOSSES: Mapping[str, _Loss] = {
    "cross_entropy": _Loss(
        options={**_WEIGHT, **_IGNORE, **_REDUCTION, "label_smoothing": Number(least=0.0, most=1.0)},
        weight=_class_weight,
    ),
    "nll_loss": _Loss(options={**_WEIGHT, **_IGNORE, **_REDUCTION}, weight=_class_weight),
    "mse_loss": _Loss(options=_REDUCTION, weight=_element_weight),
    "l1_loss": _Loss(options=_REDUCTION, weight=_element_weight),
    "smooth_l1_loss": _Loss(options={**_REDUCTION, "beta": Number(least=0.0)}, weight=_element_weight),
    "huber_loss": _Loss(options={**_REDUCTION, "delta": Number(least=1e-300)}, weight=_element_weight),
    "binary_cross_entropy": _Loss(options={**_WEIGHT, **_REDUCTION}, weight=_element_weight),
    "binary_cross_entropy_with_logits": _Loss(
        options={**_WEIGHT, **_REDUCTION, "pos_weight": _tensor}, weight=_element_weight
    ),
    "kl_div": _Loss(
        options={"reduction": OneOf(("mean", "sum", "batchmean")), "log_target": _FLAG}, weight=_divergence_weight
    ),
    "poisson_nll_loss": _Loss(
        options={**_REDUCTION, "log_input": _FLAG, "full": _FLAG, "eps": Number(least=0.0)}, weight=_element_weight
    ),
    "soft_margin_loss": _Loss(options=_REDUCTION, weight=_element_weight),
    "hinge_embedding_loss": _Loss(options={**_REDUCTION, "margin": Number()}, weight=_element_weight),
    "multi_margin_loss": _Loss(options={**_WEIGHT, **_REDUCTION, "p": OneOf((1, 2)), "margin": Number()}),
    "multilabel_margin_loss": _Loss(options=_REDUCTION),
    "multilabel_soft_margin_loss": _Loss(options={**_WEIGHT, **_REDUCTION}),
}
