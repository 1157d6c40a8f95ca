"""One thing that the service must compute as plain torch does, and what came of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import gradwire

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4}
"""Relative, in Euclidean norm: of each tensor, but at least of a thousandth of all gradients together."""
_NEGLIGIBLE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A module in the mode in which it is to run, positional and keyword inputs.

    loss: None: see `weighted_sum`; "own": the module returns it.

    inputs: a tuple, or a dict where there are keyword arguments.
    """

    group: str
    name: str
    module: nn.Module
    inputs: Any
    loss: Any = None
    targets: Any = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """verdict: "passed", "refused" or "wrong". detail: why. sharding: "rows" or "whole", on several ranks."""

    case: Any
    verdict: str
    detail: str = ""
    sharding: str = ""


def weighted_sum(outputs: Any, weights: Any) -> Tensor:
    """A loss whose gradient is different in every number of every output."""
    tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    pairs = zip([each for each in tensors if _counts(each)], tree_leaves(weights), strict=True)
    parts = [(output * weight).sum() for output, weight in pairs]
    total = torch.stack([part.real if part.is_complex() else part for part in parts]).sum()
    return total


def check(client: gradwire.Client, case: Case, ranks: int, *, given: nn.Module | None = None) -> Outcome:
    """Loss, outputs, and gradients of parameters and inputs, by the service and by torch in this process.

    given: what the service gets in place of the case's module.
    """
    inputs, loss, targets = case.inputs, case.loss, case.targets
    try:
        expected = _by_torch(copy.deepcopy(case.module), inputs, loss, targets)
    except Exception as error:
        return Outcome(case=case, verdict="refused", detail=f"by torch itself: {type(error).__name__}")
    if loss is None:
        loss, targets = weighted_sum, expected.pop("weights")
    elif loss == "own":
        loss = None
    sharding = ""
    model = None
    try:
        example = (inputs, targets) if targets is not None else (inputs,)
        model = client.create_model(given or case.module, loss=loss, example=example, workers=ranks)
        sharding = model.info().sharding.mode if ranks > 1 else ""
        result = model.compute_gradients(
            inputs, targets, input_gradients=True, outputs=True, training=case.module.training, seed=0
        )
    except gradwire.errors.GradwireError as error:
        return Outcome(case=case, verdict="refused", detail=f"{error.reason}: {error}", sharding=sharding)
    finally:
        if model is not None:
            model.delete()
    found = {
        "loss": torch.tensor(result.loss, dtype=torch.float64),
        **{f"gradient of {name}": gradient for name, gradient in result.gradients.items()},
        **_flat("input", result.input_gradients),
        **_flat("output", result.outputs),
    }
    wrong = _differences(found, expected)
    return Outcome(case=case, verdict="wrong" if wrong else "passed", detail="; ".join(wrong), sharding=sharding)


def _by_torch(module: nn.Module, inputs: Any, loss: Any, targets: Any) -> dict[str, Any]:
    def own(leaf: Tensor) -> Tensor:
        return leaf.detach().clone().requires_grad_(_counts(leaf))

    mine = tree_map_only(Tensor, own, inputs)
    outputs = module(**mine) if isinstance(mine, dict) else module(*mine)
    extra = {}
    if loss is None:
        generator = torch.Generator().manual_seed(7)
        tensors = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and _counts(leaf)]
        weights = tuple(torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in tensors)
        weights = tuple(weight.to(leaf.dtype) for weight, leaf in zip(weights, tensors, strict=True))
        value, extra = weighted_sum(outputs, weights), {"weights": weights}
    else:
        value = outputs.loss if loss == "own" else loss(outputs, targets)
    named = {name: each for name, each in module.named_parameters() if each.requires_grad}
    leaves = {f"input {i}": leaf for i, leaf in enumerate(tree_leaves(mine)) if isinstance(leaf, Tensor)}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    sources = [*named.values(), *leaves.values()]
    gradients = torch.autograd.grad(value, sources, allow_unused=True) if sources else ()
    by_name = dict(zip([*(f"gradient of {name}" for name in named), *leaves], gradients, strict=True))
    return {"loss": value.detach(), **by_name, **_flat("output", outputs), **extra}


def _flat(what: str, value: Any) -> dict[str, Any]:
    return {f"{what} {index}": leaf for index, leaf in enumerate(tree_flatten(value)[0]) if isinstance(leaf, Tensor)}


def _counts(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    gradients = [
        each for name, each in expected.items() if isinstance(each, Tensor) and not name.startswith(("output", "loss"))
    ]
    least = _NEGLIGIBLE * sum(float(each.norm()) ** 2 for each in gradients) ** 0.5
    wrong = []
    for name, reference in expected.items():
        value = found.get(name)
        if reference is None and name.startswith("input") and value is not None and not value.any():
            continue  # the service gives zeros for an input on which the loss does not depend
        if reference is None or value is None:
            if value is not reference:
                wrong.append(f"{name} is {'missing' if value is None else 'there'}")
            continue
        if value.shape != reference.shape:
            wrong.append(f"{name} has shape {tuple(value.shape)} instead of {tuple(reference.shape)}")
        elif not _counts(reference):
            if not torch.equal(value, reference):
                wrong.append(f"{name} differs")
        elif error := _error(value.to(reference.dtype), reference.detach(), 0.0 if name[0] in "ol" else least):
            wrong.append(f"{name} is off by {error:.1e}")
    return wrong


def _error(value: Tensor, reference: Tensor, least: float) -> float:
    if not torch.equal(value.isfinite(), reference.isfinite()):
        return float("inf")
    value, reference = value.nan_to_num(), reference.nan_to_num()
    scale = max(float(reference.norm()), least)
    error = float((value - reference).norm())
    tolerance = TOLERANCE.get(reference.real.dtype if reference.is_complex() else reference.dtype, 2e-2)
    return error / max(scale, 1e-300) if error > tolerance * scale + 1e-30 else 0.0
