"""Losses of torch.nn.functional that torch.export cannot look into, made such that it can, with the same numbers.

It sees every call of them, by whatever name the user's code has for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import log, pi
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn import _reduction
from torch.overrides import TorchFunctionMode

from gradwire_proto.errors import ExportError


class TraceableLosses(TorchFunctionMode):
    """Inside, this thread's calls of such losses are what torch.export can trace. `insert` finishes the graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _TRACEABLE.get(func, func)(*args, **(kwargs or {}))

    @staticmethod
    def insert(module: fx.GraphModule) -> None:
        """Put PyTorch's own operator where the exported graph has a stand-in: it runs, and can be encoded."""
        for each in [each for each in module.modules() if isinstance(each, fx.GraphModule)]:
            found = [node for node in each.graph.nodes if node.target is _ctc_stand_in()]
            for node in found:
                node.target = torch.ops.aten.ctc_loss.Tensor
            if found:
                each.recompile()


def _gaussian_nll_loss(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """torch's own, but that its check of `var` is an assertion of the graph: an `if` on a tensor has no place there."""
    if not isinstance(var, Tensor):
        return F.gaussian_nll_loss(input, target, var, full, eps, reduction)
    torch.ops.aten._assert_async.msg(~torch.any(var < 0), "var has negative entry/entries")
    if var.shape != input.shape:
        if input.shape[:-1] == var.shape:
            var = var.unsqueeze(-1)
        elif input.dim() != var.dim() or sum(y for x, y in zip(input.shape, var.shape, strict=True) if x != y) != 1:
            raise ValueError("var is of incorrect size")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    var = var.clone()
    # torch's is under no_grad, which torch.export does not see inside a function of torch's.
    var.detach().clamp_(min=eps)
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss += 0.5 * log(2 * pi)
    return loss if reduction == "none" else getattr(loss, reduction)()


def _linear_cross_entropy(*arguments: Any, options: Any = None, **keywords: Any) -> Tensor:
    """In one piece: the chunks of `options` save memory, and their operators are no part of the contract."""
    return F.linear_cross_entropy(*arguments, **keywords)


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """One operator, whose sizes depend on the lengths' values only inside."""
    lengths = [
        each if isinstance(each, Tensor) else torch.tensor(each, dtype=torch.int64, device=log_probs.device)
        for each in (input_lengths, target_lengths)
    ]
    how = _reduction.get_enum(reduction) if isinstance(reduction, str) else reduction
    return _ctc_stand_in()(log_probs, targets, *lengths, blank, how, zero_infinity)


_TRACEABLE: dict[Any, Any] = {
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.linear_cross_entropy: _linear_cross_entropy,
    F.ctc_loss: _ctc_loss,
    torch.ctc_loss: _ctc_loss,
}


@cache
def _library() -> torch.library.Library:
    """Holds the stand-in: gone with it, so it is kept."""
    library = torch.library.Library("gradwire_export", "FRAGMENT")
    library.define(
        "ctc_loss(Tensor log_probs, Tensor targets, Tensor input_lengths, Tensor target_lengths, int blank,"
        " int reduction, bool zero_infinity) -> Tensor"
    )
    torch.library.register_fake("gradwire_export::ctc_loss", _without_values, lib=library)
    torch.library.register_autograd("gradwire_export::ctc_loss", _refuse_gradient, lib=library)
    return library


def _ctc_stand_in() -> Any:
    """What stands for aten.ctc_loss.Tensor while torch.export runs: that has no result without values."""
    _library()
    return torch.ops.gradwire_export.ctc_loss.default


def _without_values(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor,
    target_lengths: Tensor,
    blank: int,
    reduction: int,
    zero_infinity: bool,
) -> Tensor:
    batch: Sequence[Any] = log_probs.shape[1:2] if log_probs.dim() == 3 else ()
    for lengths in (input_lengths, target_lengths):
        torch._check(lengths.numel() == (batch[0] if batch else 1))
    return log_probs.new_empty(tuple(batch) if reduction == 0 else ())


def _refuse_gradient(ctx: Any, *gradients: Tensor) -> Any:
    raise ExportError(
        "ctc_loss is differentiated inside the module itself (torch.autograd.grad in a forward), which cannot be"
        " exported: let client.grad or the training step differentiate it, once",
        reason="EXPORT_FAILED",
    )
