"""What `compute_gradients` is asked for, from what users pass."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from gradwire.arguments import as_bool, as_int, as_text, is_finite_number, wrong_type
from gradwire.errors import InvalidArgument
from gradwire_proto.tensors import dtype_name
from gradwire_proto.values import GradientQuery, StateTensor, TensorData, Value, leaves


def gradient_query(
    *,
    wrt: Any,
    input_gradients: Any,
    outputs: Any,
    dtype: Any,
    training: Any,
    seed: Any,
    per_example: bool = False,
    top_k: Any = None,
) -> GradientQuery:
    """The query of these arguments, with a seed of its own where none is given.

    Raises InvalidArgument for an argument of another type than `Model.compute_gradients` says.
    """
    return GradientQuery(
        wrt=names_of(wrt),
        input_gradients=as_bool(input_gradients, "input_gradients"),
        outputs=as_bool(outputs, "outputs"),
        training=as_bool(training, "training"),
        seed=fresh_seed() if seed is None else as_int(seed, "seed"),
        gradient_dtype=_dtype(dtype),
        per_example=per_example,
        top_k=_fraction(top_k),
    )


def fresh_seed() -> int:
    """A seed that no other call has. Not from torch's generator: reading a model leaves that as it is."""
    return secrets.randbits(63)  # what the proto's int64 holds


def check_keeps_imaginary_parts(query: GradientQuery, tensors: Sequence[StateTensor], inputs: Value) -> None:
    """Refuse a real gradient_dtype for gradients that are complex: half of each would be lost."""
    wanted = query.gradient_dtype
    if wanted is None or wanted.startswith("complex"):
        return
    of_parameters = (f"{each.name!r}" for each in tensors if _is_complex(each.dtype) and _is_chosen(each, query.wrt))
    given = leaves(inputs, "inputs") if query.input_gradients else ()
    of_inputs = (path for path, leaf in given if isinstance(leaf, TensorData) and _is_complex(leaf.dtype))
    for what in (*of_parameters, *of_inputs):
        message = f"expected a complex type, got {wanted}: the gradient of {what} is complex"
        raise InvalidArgument(message, field="gradient_dtype", reason="DTYPE_NOT_COMPLEX")


def names_of(wrt: Any) -> tuple[str, ...] | None:
    """Names or globs of parameters, given as one or several; None for all. InvalidArgument for anything else."""
    if wrt is None:
        return None
    if isinstance(wrt, str):
        return (as_text(wrt, "wrt"),)
    # These hold something else than names, but can be iterated over.
    if not isinstance(wrt, Iterable) or isinstance(wrt, (bytes, bytearray, torch.Tensor, np.ndarray)):
        raise wrong_type(wrt, "wrt", "names or globs of parameters")
    return tuple(as_text(name, f"wrt[{index}]") for index, name in enumerate(wrt))


def dense_or_sparse(gradient: Any) -> torch.Tensor:
    """A gradient as users get it: (shape, row-major indices, values) become a sparse tensor, coalesced."""
    if not isinstance(gradient, tuple):
        return gradient
    shape, indices, values = gradient
    places = torch.stack(torch.unravel_index(indices, shape)) if shape else indices.new_empty((0, len(indices)))
    return torch.sparse_coo_tensor(places, values, shape, is_coalesced=True, check_invariants=True)


def _fraction(top_k: Any) -> float | None:
    if top_k is None:
        return None
    if not is_finite_number(top_k) or not 0 < top_k <= 1:
        message = f"must be a fraction above 0 and at most 1, got {top_k!r:.80}"
        raise InvalidArgument(message, field="top_k", reason="TOP_K_INVALID")
    return float(top_k)


def _dtype(dtype: Any) -> str | None:
    if dtype is None or isinstance(dtype, str):
        return dtype
    if isinstance(dtype, torch.dtype):
        return dtype_name(dtype, "gradient_dtype")
    raise wrong_type(dtype, "gradient_dtype", "a torch.dtype or its name")


def _is_chosen(tensor: StateTensor, wrt: tuple[str, ...] | None) -> bool:
    return tensor.requires_grad and (
        wrt is None or any(tensor.name == each or fnmatchcase(tensor.name, each) for each in wrt)
    )


def _is_complex(dtype: str) -> bool:
    return dtype.startswith("complex")
