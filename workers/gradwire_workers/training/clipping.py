"""Bounds of gradients, as torch.nn.utils.clip_grad_norm_ and clip_grad_value_ set them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.training.option_check import Number


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """norm: what the norm of all gradients together may be; value: what each element may; both above 0."""

    norm: float | None = None
    value: float | None = None

    def __bool__(self) -> bool:
        """Whether anything is clipped."""
        return self.norm is not None or self.value is not None

    def check(self, parameters: Iterable[Tensor]) -> None:
        """Refuse bounds that are none, and those that torch cannot apply."""
        for name, bound in (("clip_grad_norm", self.norm), ("clip_grad_value", self.value)):
            expected = None if bound is None else Number(above=0.0)(bound)
            if expected is not None:
                raise InvalidArgument(
                    f"expected {expected}, got {bound!r}", field=f"model.{name}", reason="OPTION_OUT_OF_RANGE"
                )
        if self.value is not None and any(each.is_complex() for each in parameters):
            raise InvalidArgument(
                "complex gradients have no order, and cannot be cut to a value",
                field="model.clip_grad_value",
                reason="OPTIMIZER_UNFIT",
            )

    def apply(self, parameters: Iterable[nn.Parameter]) -> float:
        """Clip the gradients in place, by norm and then by value. Returns their norm before."""
        parameters = list(parameters)
        if self.norm is not None:
            total = clip_grad_norm_(parameters, self.norm)
        else:
            total = get_total_norm([each.grad for each in parameters if each.grad is not None])
        if self.value is not None:
            clip_grad_value_(parameters, self.value)
        return float(total)
