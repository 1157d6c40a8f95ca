"""Runs the module itself and its graph once on the example, with the same random numbers, and compares everything.

Other constructs than those refused by name also export cleanly and lose their gradient (hooks on tensors, saved-tensor
hooks, torch.func inside a forward). A difference in an output or in any gradient is an ExportError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwire.exporting.random_state import cuda_devices, python_random_refused, seed
from gradwire.exporting.tracing import quiet, quote
from gradwire_proto.autocast import autocast
from gradwire_proto.errors import ExportError, GradwireError

_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float16: 2e-2, torch.bfloat16: 5e-2}
_SMALL = 1e-3

_HALF = {"bf16": _TOLERANCE[torch.bfloat16], "fp16": _TOLERANCE[torch.float16]}

Forward = Callable[[Sequence[Any]], tuple[list[Any], Tensor | None]]
"""Input leaves -> (flat outputs, loss)."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run gave: outputs, loss, gradients by the name of what they belong to, and the buffers after it.

    precision: at which it was computed."""

    outputs: list[Any]
    loss: Tensor | None
    gradients: dict[str, Tensor | None]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    precision: str = "fp32"


def run(
    forward: Forward,
    leaves: Sequence[Any],
    parameters: dict[str, Tensor],
    *,
    subject: str,
    differentiate: bool = True,
    differentiate_leaves: bool = True,
    buffers: Callable[[], Mapping[str, Tensor]] = dict,
    precision: str = "fp32",
) -> Run:
    """Run forward and backward from seed 0. What the user's code raises becomes ExportError EXAMPLE_FAILED.

    differentiate: False for the forward alone. differentiate_leaves: whether to give the leaves gradients as well.
    buffers: gives the values of the buffers, and is asked after the run. precision: the forward's.
    """
    seed(cuda_devices((*leaves, *parameters.values())))
    try:
        with quiet(), torch.set_grad_enabled(differentiate), autocast("fp32"), python_random_refused(subject):
            sources = [_source(leaf, differentiate_leaves) for leaf in leaves]
            # A copy that is no leaf of autograd: the module may change its inputs in place.
            with autocast(precision):
                outputs, loss = forward([_copy(source) for source in sources])
            watched = dict(parameters)
            watched |= {f"inputs, leaf {i}": s for i, s in enumerate(sources) if _has_gradient(s)}
            gradients = _gradients(outputs, loss, watched)
            # Copies: an output may be a buffer itself, which is about to be put back.
            outputs = [output.detach().clone() if isinstance(output, Tensor) else output for output in outputs]
            return Run(outputs=outputs, loss=loss, gradients=gradients, buffers=buffers(), precision=precision)
    except GradwireError:
        raise
    except Exception as error:
        raise ExportError(
            f"{subject} fails on the example: {quote(error)}", field="example", reason="EXAMPLE_FAILED"
        ) from error


def compare(eager: Run, graph: Run, before: Mapping[str, Tensor] | None = None) -> None:
    """Raise ExportError EXPORT_MISMATCH, naming the parameter, buffer or output, where the graph is not the module.

    before: the buffers from which both runs started.
    """
    half = _HALF.get(eager.precision, 0.0)
    if len(eager.outputs) != len(graph.outputs):
        raise _mismatch(f"it returns {len(graph.outputs)} values instead of {len(eager.outputs)}")
    for index, (ours, theirs) in enumerate(zip(eager.outputs, graph.outputs, strict=True)):
        if not _same(ours, theirs, _SMALL, half):
            raise _mismatch(f"output {index} differs")
    if not _same(eager.loss, graph.loss, _SMALL, half):
        raise _mismatch(
            "the loss differs. A loss sees the outputs and targets alone, not what a forward keeps in attributes"
        )
    everything = _norm([g for g in eager.gradients.values() if g is not None])
    for name, ours in eager.gradients.items():
        if not _same(ours, graph.gradients[name], _SMALL * everything, half):
            raise _mismatch(f"the gradient of {name} differs{_by(ours, graph.gradients[name])}", field=name)
    for name, ours in eager.buffers.items():
        if not _same_move((before or {}).get(name), ours, graph.buffers.get(name), half):
            raise _mismatch(f"buffer {name!r} is another one after the forward", field=name)


def same_gradients(eager: Run, graph: Run) -> frozenset[str]:
    """The names of what has the same gradient in both runs; none where these differ in an output or in the loss."""
    half = _HALF.get(eager.precision, 0.0)
    if not all(
        _same(ours, theirs, _SMALL, half)
        for ours, theirs in zip([eager.loss, *eager.outputs], [graph.loss, *graph.outputs], strict=True)
    ):
        return frozenset()
    floor = _SMALL * _norm([g for g in eager.gradients.values() if g is not None])
    return frozenset(name for name, ours in eager.gradients.items() if _same(ours, graph.gradients[name], floor, half))


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
    for name, gradient in zip(watched, gradients, strict=True):
        if gradient is not None and gradient.layout is not torch.strided:
            raise ExportError(
                f"the gradient of {name} is sparse, and the service keeps dense ones: make its layer with sparse=False",
                field=name,
                reason="EXPORT_SPARSE_GRADIENT",
            )
    return dict(zip(watched, gradients, strict=True))


def _same(ours: Any, theirs: Any, floor: float, half: float = 0.0) -> bool:
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
    return difference <= max(_TOLERANCE.get(ours.dtype, 1e-4), half) * max(_norm([ours[finite]]), floor)


def _same_move(before: Tensor | None, ours: Tensor, theirs: Tensor | None, half: float) -> bool:
    """Whether two runs moved a buffer alike: a move may be small beside the buffer, such as that of slow averages."""
    if not _same(ours, theirs, _SMALL, half):
        return False
    if before is None or theirs is None or not (ours.is_floating_point() or ours.is_complex()):
        return True
    finite = torch.isfinite(ours)
    rounding = 8 * torch.finfo(ours.dtype).eps * _norm([ours[finite]])
    move = _norm([(ours - before)[finite]]) if before.shape == ours.shape else 0.0
    difference = _norm([(ours - theirs)[finite]])
    return difference <= max(max(_TOLERANCE.get(ours.dtype, 1e-4), half) * move, rounding)


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
        " torch.func inside a forward, and functions whose backward asks which other inputs need gradients cannot be"
        " exported",
        field=field,
        reason="EXPORT_MISMATCH",
    )


def agree(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Whether two lists of outputs are the same, to rounding."""
    return len(ours) == len(theirs) and all(_same(one, two, _SMALL) for one, two in zip(ours, theirs, strict=True))
