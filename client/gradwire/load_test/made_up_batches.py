"""Batches for models that nothing is known of but what they take: `ModelInfo.variants` tells types and shapes."""

from __future__ import annotations

from typing import Any

import torch

from gradwire.errors import FailedPrecondition
from gradwire_proto.names import model_name
from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import ROWS, Leaf, ModelInfo, TensorSpec, Variant, unflatten


def made_up_batch(info: ModelInfo, *, training: bool, rows: int, seed: int) -> tuple[Any, Any]:
    """(inputs, targets) that fit the model's first variant of the mode. Sizes that are open are the smallest.

    Numbers are drawn between 0 and 1; integers are 0, which every embedding and every loss has; bools are True, which
    masks nothing. Raises FailedPrecondition (CANNOT_BE_FED) where the model tells no variant.
    """
    variant = next((each for each in info.variants if each.training is training), None)
    if variant is None:
        mode = "training" if training else "eval"
        what = "its service builds graphs by the batch" if info.architecture else f"it has no {mode} variant"
        message = f"no inputs can be made up for {model_name(info.id)}: {what}; let the load test create models instead"
        raise FailedPrecondition(message, reason="CANNOT_BE_FED", resource=model_name(info.id))
    sizes = _sizes(variant, rows)
    generator = torch.Generator().manual_seed(seed)
    inputs = [_made_up(leaf, sizes, generator) for leaf in variant.input_leaves]
    targets = [_made_up(leaf, sizes, generator) for leaf in variant.target_leaves]
    return unflatten(variant.input_structure, inputs), unflatten(variant.target_structure, targets)


def _sizes(variant: Variant, rows: int) -> dict[str, int]:
    bounds = {symbol.name: symbol for symbol in variant.symbols}
    sizes = {name: max(symbol.min, 1) for name, symbol in bounds.items()}
    known = bounds.get(ROWS)
    sizes[ROWS] = rows if known is None else max(known.min, min(rows, rows if known.max is None else known.max))
    return sizes


def _made_up(leaf: Leaf, sizes: dict[str, int], generator: torch.Generator) -> Any:
    if not isinstance(leaf, TensorSpec):
        return leaf.value
    shape = [sizes[size] if isinstance(size, str) else size for size in leaf.shape]
    dtype = torch_dtype(leaf.dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.rand(shape, generator=generator, dtype=torch.float32).to(dtype)
    return torch.zeros(shape, dtype=dtype)
