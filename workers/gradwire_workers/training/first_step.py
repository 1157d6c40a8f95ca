"""An optimizer's first step, taken on small parameters of the same kinds.

What torch cannot do with some options and parameters comes out here, where nothing is lost, instead of halfway through
an update; and it shows what the optimizer keeps of each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class TensorLike:
    """What a tensor is, but for its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


_SMALL = 2
"""The largest size of a dimension of a small parameter. Above 1: what is reduced to 1 can be told."""


def first_states(
    make: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    *,
    owner: str,
    field: str,
) -> list[dict[str, Any]]:
    """What the optimizer keeps of each parameter after a step: TensorLikes of the parameter's sizes, and plain values.

    Raises InvalidArgument: OPTION_OUT_OF_RANGE at `field`.options where the options contradict each other,
    OPTIMIZER_UNFIT where it cannot update such parameters.
    """
    kinds = {_kind(parameter): parameter for parameter in parameters}
    small = {kind: _small(parameter) for kind, parameter in kinds.items()}
    matrix = torch.zeros(1, 1, dtype=parameters[0].dtype, device=parameters[0].device)
    try:
        # Every optimizer takes a matrix: what is refused here is refused for the options' sake.
        make([nn.Parameter(matrix)], **options)
    except (ValueError, RuntimeError, TypeError) as error:
        raise InvalidArgument(str(error), field=f"{field}.options", reason="OPTION_OUT_OF_RANGE") from error
    try:
        optimizer = make(list(small.values()), **options)
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(lambda: torch.zeros(()))
        else:
            optimizer.step()
    except (ValueError, RuntimeError, TypeError, ArithmeticError, AssertionError) as error:
        raise InvalidArgument(
            f"{owner} cannot update these parameters with these options: {error}", field=field, reason="OPTIMIZER_UNFIT"
        ) from error
    return [
        {name: _like(value, small[_kind(each)], each) for name, value in optimizer.state[small[_kind(each)]].items()}
        for each in parameters
    ]


def _kind(parameter: nn.Parameter) -> tuple[Any, ...]:
    return parameter.dtype, parameter.device, tuple(min(size, _SMALL) for size in parameter.shape)


def _small(parameter: nn.Parameter) -> nn.Parameter:
    dtype, device, shape = _kind(parameter)
    small = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
    small.grad = torch.zeros_like(small)
    return small


def _like(value: Any, small: nn.Parameter, parameter: nn.Parameter) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = tuple(value.shape)
    if value.dim() == small.dim():
        sizes = zip(shape, small.shape, parameter.shape, strict=True)
        shape = tuple(whole if size == least else size for size, least, whole in sizes)
    return TensorLike(shape=shape, dtype=value.dtype, device=value.device)
