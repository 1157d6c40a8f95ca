"""What layers do differently on ranks: batch norm over all rows, and for a check no dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.overrides import TorchFunctionMode

from gradwire_workers.programs.batch_norm import BatchNorm

Function = Callable[..., Any]


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every batch norm in the module."""
    return [each for each in module.modules() if isinstance(each, _BatchNorm)]


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that move in training. Torch does not count that among the writes to a tensor."""
    layers = (each for each in module.modules() if isinstance(each, _NormBase))
    return [each for layer in layers for each in (layer.running_mean, layer.running_var) if each is not None]


def replace_batch_norms(module: nn.Module, function: BatchNorm) -> None:
    """Make every batch norm call `function` with aten.batch_norm's nine arguments. What its layer does else stays."""
    for layer in batch_norms(module):
        layer.forward = partial(_forward, layer, _BatchNormReplaced(function))  # type: ignore[method-assign]


def _forward(layer: _BatchNorm, mode: TorchFunctionMode, input: Tensor) -> Tensor:
    with mode:
        return type(layer).forward(layer, input)


class _BatchNormReplaced(TorchFunctionMode):
    def __init__(self, function: BatchNorm) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        enabled = torch.backends.cudnn.enabled
        return self._function(input, weight, bias, running_mean, running_var, training, momentum, eps, enabled)


class WithoutDropout(TorchFunctionMode):
    """Inside, nothing that the allowed classes compute draws random numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _TRAINING:
            position = _TRAINING[func]
            args, kwargs = _put(args, kwargs, position, "training", False)
        elif func in _PROBABILITY:
            position = _PROBABILITY[func]
            args, kwargs = _put(args, kwargs, position, "dropout_p", 0.0)
        return func(*args, **kwargs)


def _put(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


# Function: where its flag `training` stands.
_TRAINING: dict[Any, int] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), 2),
    F.rrelu: 3,
    F.multi_head_attention_forward: 13,
}
# Function: where its probability stands. Those of recurrent layers are called by position.
_PROBABILITY: dict[Any, int] = {
    F.scaled_dot_product_attention: 4,
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), 5),
}
