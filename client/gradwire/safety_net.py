"""Runs the module itself and its graph once on the example, with the same random numbers, and compares everything.

Other constructs than those refused by name also export cleanly and lose their gradient (hooks on tensors, saved-tensor
hooks, torch.func inside a forward). A difference in an output or in any gradient is an ExportError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire.tracing import ambient_autocast_off, quiet, quote
from gradwire_proto.errors import ExportError, GradwireError

_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_SMALL = 1e-3

Forward = Callable[[Sequence[Any]], tuple[list[Any], Tensor | None]]
"""Input leaves -> (flat outputs, loss)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run gave: outputs, loss, and gradients by the name of what they belong to."""

    outputs: list[Any]
    loss: Tensor | None
    gradients: dict[str, Tensor | None]


def run(
    forward: Forward,
    leaves: Sequence[Any],
    parameters: dict[str, Tensor],
    *,
    subject: str,
    differentiate_leaves: bool = True,
) -> Run:
    """Run forward and backward from seed 0. What the user's code raises becomes ExportError EXAMPLE_FAILED."""
    torch.manual_seed(0)
    try:
        with quiet(), torch.enable_grad(), ambient_autocast_off():
            sources = [_source(leaf, differentiate_leaves) for leaf in leaves]
            # A copy that is no leaf of autograd: the module may change its inputs in place.
            outputs, loss = forward([_copy(source) for source in sources])
            watched = dict(parameters)
            watched |= {f"inputs, leaf {i}": s for i, s in enumerate(sources) if _has_gradient(s)}
            return Run(outputs=outputs, loss=loss, gradients=_gradients(outputs, loss, watched))
    except GradwireError:
        raise
    except Exception as error:
        raise ExportError(
            f"{subject} fails on the example: {quote(error)}", field="example", reason="EXAMPLE_FAILED"
        ) from error


def compare(eager: Run, graph: Run) -> None:
    """Raise ExportError EXPORT_MISMATCH, naming the parameter or output, where the graph is not the module."""
    if len(eager.outputs) != len(graph.outputs):
        raise _mismatch(f"it returns {len(graph.outputs)} values instead of {len(eager.outputs)}")
    for index, (ours, theirs) in enumerate(zip(eager.outputs, graph.outputs, strict=True)):
        if not _same(ours, theirs, _SMALL):
            raise _mismatch(f"output {index} differs")
    if not _same(eager.loss, graph.loss, _SMALL):
        raise _mismatch("the loss differs")
    everything = _norm([g for g in eager.gradients.values() if g is not None])
    for name, ours in eager.gradients.items():
        if not _same(ours, graph.gradients[name], _SMALL * everything):
            raise _mismatch(f"the gradient of {name} differs{_by(ours, graph.gradients[name])}", field=name)


def _source(leaf: Any, differentiable: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    copy = leaf.detach().clone()
    return copy.requires_grad_(differentiable and (copy.is_floating_point() or copy.is_complex()))


def _copy(source: Any) -> Any:
    return source.clone() if isinstance(source, Tensor) else source


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _gradients(outputs: list[Any], loss: Tensor | None, watched: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of the loss plus a random combination of the outputs, so that every path to any of them counts."""
    generator = torch.Generator().manual_seed(1)
    total = []
    for output in (loss, *outputs):
        if not _has_gradient(output):
            continue
        assert output is not None
        if output.is_complex():
            output = torch.view_as_real(output)
        weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
        # A mean, of the size of a usual loss, so that the loss is not lost beside it.
        total.append((output.double() * weight.to(output.device)).sum() / max(output.numel(), 1))
    if not total or not watched:
        return dict.fromkeys(watched)
    gradients = torch.autograd.grad(sum(total[1:], total[0]), list(watched.values()), allow_unused=True)
    return dict(zip(watched, gradients, strict=True))


def _same(ours: Any, theirs: Any, floor: float) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        if type(ours) is not type(theirs):
            return False
        return bool(ours == theirs or (ours != ours and theirs != theirs))
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    ours, theirs = ours.detach(), theirs.detach()
    # Bit-equal is the rule, and cheap to see.
    if torch.equal(ours, theirs):
        return True
    if not (ours.is_floating_point() or ours.is_complex()):
        return False
    finite = torch.isfinite(ours)
    if not torch.equal(finite, torch.isfinite(theirs)):
        return False
    difference = _norm([(ours - theirs)[finite]])
    return difference <= _TOLERANCE.get(ours.dtype, 1e-4) * max(_norm([ours[finite]]), floor)


def _norm(tensors: list[Tensor]) -> float:
    return float(sum(float(tensor.detach().abs().double().square().sum()) for tensor in tensors)) ** 0.5


def _by(ours: Tensor | None, theirs: Tensor | None) -> str:
    if ours is None or theirs is None:
        return (
            f": the module gives {'none' if ours is None else 'one'}, the graph {'none' if theirs is None else 'one'}"
        )
    return f": norm {_norm([ours]):.6g} in the module, {_norm([theirs]):.6g} in the graph"


def _mismatch(what: str, field: str | None = None) -> ExportError:
    return ExportError(
        f"the exported graph does not compute what the module does: {what}. Hooks on tensors or on saved tensors,"
        " torch.func and custom gradients inside a forward cannot be exported",
        field=field,
        reason="EXPORT_MISMATCH",
    )


def agree(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists of outputs are the same, to rounding."""
    return len(ours) == len(theirs) and all(_same(one, two, _SMALL) for one, two in zip(ours, theirs, strict=True))
