"""The user's loss -> one that the service knows by name, or a function to be exported as a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradwire_proto.errors import ExportError, InvalidArgument
from gradwire_proto.tensors import from_torch
from gradwire_proto.values import LossSpec, TorchLossSpec

_OPTIONS = {
    nn.CrossEntropyLoss: ("cross_entropy", ("weight", "ignore_index", "reduction", "label_smoothing")),
    nn.NLLLoss: ("nll_loss", ("weight", "ignore_index", "reduction")),
    nn.MSELoss: ("mse_loss", ("reduction",)),
    nn.L1Loss: ("l1_loss", ("reduction",)),
    nn.SmoothL1Loss: ("smooth_l1_loss", ("reduction", "beta")),
    nn.HuberLoss: ("huber_loss", ("reduction", "delta")),
    nn.BCELoss: ("binary_cross_entropy", ("weight", "reduction")),
    nn.BCEWithLogitsLoss: ("binary_cross_entropy_with_logits", ("weight", "reduction", "pos_weight")),
    nn.KLDivLoss: ("kl_div", ("reduction", "log_target")),
}
"""torch.nn's losses that ranks compute by name: their function in torch.nn.functional, and what they are made with."""

LOSSES_BY_NAME = {name: (kind, function) for kind, (name, _) in _OPTIONS.items() for function in (getattr(F, name),)}
_SHORT_NAMES = {
    "mse": "mse_loss",
    "l1": "l1_loss",
    "nll": "nll_loss",
    "huber": "huber_loss",
    "bce": "binary_cross_entropy",
}
_BY_CLASSES = ("cross_entropy", "nll_loss")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss as the SDK handles it.

    function: computes it here, from outputs and targets. spec: its name on the service, where it has one.
    module: the nn.Module that it is, if it is one.
    """

    function: Callable[[Any, Any], Any]
    spec: LossSpec | None = None
    module: nn.Module | None = None

    def fits(self, outputs: list[Any], targets: list[Any]) -> bool:
        """Whether the loss by name means the same for these leaves: one output, one target, nothing broadcast.

        A broadcast loss is no sum over rows, so it travels as a graph.
        """
        if not isinstance(self.spec, TorchLossSpec) or len(outputs) != 1 or len(targets) != 1:
            return False
        output, target = outputs[0], targets[0]
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            return False
        if self.spec.name in _BY_CLASSES:
            return output.dim() >= 2
        return output.shape == target.shape and not {"weight", "pos_weight"} & set(self.spec.options)

    def compared_sizes(self, output: Sequence[Any], target_dimensions: int) -> list[tuple[int, Any]]:
        """(dimension of the target, the size of the output to which it is equal), for a loss by name that fits."""
        assert isinstance(self.spec, TorchLossSpec)
        if self.spec.name in _BY_CLASSES and target_dimensions < len(output):
            output = [output[0], *output[2:]]
        return list(enumerate(output))


def as_loss(loss: Any) -> Loss | None:
    """The loss that a user gave: one of torch.nn, its name, any callable(outputs, targets), or None.

    Raises InvalidArgument for a name that is unknown, and ExportError for a loss that could not be one.
    """
    if loss is None:
        return None
    if isinstance(loss, str):
        name = _SHORT_NAMES.get(loss, loss)
        if name not in LOSSES_BY_NAME:
            raise InvalidArgument(
                f"unknown loss {loss!r}; expected one of {', '.join(sorted(LOSSES_BY_NAME))}, a loss of torch.nn or a"
                " callable(outputs, targets)",
                field="loss",
                reason="LOSS_UNKNOWN",
            )
        return Loss(function=LOSSES_BY_NAME[name][1], spec=TorchLossSpec(name))
    if isinstance(loss, nn.Module):
        return _from_module(loss)
    if not callable(loss):
        raise InvalidArgument(
            "expected a loss of torch.nn, its name, a callable(outputs, targets) or None;"
            f" got {type(loss).__qualname__}",
            field="loss",
            reason="LOSS_UNKNOWN",
        )
    for name, (_, function) in LOSSES_BY_NAME.items():
        if loss is function:
            return Loss(function=function, spec=TorchLossSpec(name))
    return Loss(function=loss)


def _from_module(loss: nn.Module) -> Loss:
    if any(parameter.requires_grad for parameter in loss.parameters()):
        raise ExportError(
            "the loss has parameters of its own, which would not be trained: put them into the module, let it return"
            " the loss, and create the model with loss=None",
            field="loss",
            reason="LOSS_HAS_PARAMETERS",
        )
    if getattr(loss, "reduction", None) == "none":
        raise ExportError("reduction='none' gives no scalar", field="loss", reason="LOSS_NOT_SCALAR")
    # Exactly that class: one derived from it may compute anything.
    name, options = _OPTIONS.get(type(loss), ("", ()))
    if not name or loss._forward_hooks or loss._forward_pre_hooks:
        return Loss(function=loss, module=loss)
    return Loss(function=loss, spec=TorchLossSpec(name, _given(loss, options)), module=loss)


def _given(loss: nn.Module, options: tuple[str, ...]) -> Mapping[str, Any]:
    values = {option: getattr(loss, option) for option in options}
    return {name: from_torch(v) if isinstance(v, Tensor) else v for name, v in values.items() if v is not None}
