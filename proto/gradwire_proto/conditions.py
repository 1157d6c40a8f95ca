"""How torch.cond runs: one of two graphs, for ranks and for those who compare with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument

Branch = Callable[..., Sequence[Any]]


def run_cond(predicate: Any, when_true: Branch, when_false: Branch, operands: Sequence[Any]) -> list[Any]:
    """The outputs of the branch that `predicate`, a tensor of one truth value, chooses; both take `operands`.

    Raises InvalidArgument PROGRAM_FAILED for any other predicate: one of sizes alone would not show that rows that are
    computed apart depend on how many there are.
    """
    if not isinstance(predicate, Tensor) or predicate.dtype is not torch.bool or predicate.numel() != 1:
        raise InvalidArgument(
            "torch.cond: expected a tensor with one truth value as predicate", field="program", reason="PROGRAM_FAILED"
        )
    chosen = predicate.reshape(())
    outputs = list((when_true if bool(chosen) else when_false)(*operands))
    places = [index for index, each in enumerate(outputs) if isinstance(each, Tensor)]
    results = _Chosen.apply(chosen, len(places), *(outputs[index] for index in places), *_tensors(operands))
    for index, result in zip(places, results, strict=True):  # type: ignore[arg-type]
        outputs[index] = result
    return outputs


def _tensors(operands: Sequence[Any]) -> list[Tensor]:
    return [each for each in operands if isinstance(each, Tensor)]


class _Chosen(torch.autograd.Function):
    """A branch's results as they are; what only the other branch reads has a gradient too, as in torch.cond: zero."""

    @staticmethod
    def forward(ctx: Any, chosen: Tensor, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, operands = tensors[:count], tensors[count:]
        ctx.save_for_backward(*operands)
        # The same values; but that they depend on the predicate is now seen by whoever follows tensors.
        results = tuple(torch.where(chosen, each, each) for each in results)
        ctx.mark_non_differentiable(*(each for each in results if not (each.is_floating_point() or each.is_complex())))
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[2 + len(gradients) :]
        zeros = (
            torch.zeros_like(each) if needs else None for each, needs in zip(ctx.saved_tensors, needed, strict=True)
        )
        return None, None, *gradients, *zeros
