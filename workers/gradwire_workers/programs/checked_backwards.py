"""Backward operators that trust shapes and indices, with the check that is missing: custom functions name them freely.

What a gradient must look like is found by running the forward on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.operators import resolve

Given = dict[str, Any]
"""The arguments of a call by name, defaults included."""


def wrong_shapes(message: str) -> InvalidArgument:
    """The error of operands that do not fit each other."""
    return InvalidArgument(message, field="batch", reason="PROGRAM_FAILED")


def check_indices(what: str, indices: Tensor, most: int, *, but: int | None = None) -> None:
    """Raise INDEX_OUT_OF_RANGE for whole numbers that are not in [0, most), and not `but`."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype is torch.bool:
        raise wrong_shapes(f"{what} must be whole numbers")
    outside = (indices < 0) | (indices >= most)
    if bool((outside if but is None else outside & (indices != but)).any()):
        raise InvalidArgument(f"{what}: expected [0, {most})", field="batch", reason="INDEX_OUT_OF_RANGE")


def _check_layer_norm(given: Given) -> None:
    values, shape = given["input"], tuple(given["normalized_shape"])
    if not shape or tuple(values.shape[-len(shape) :]) != shape or given["grad_out"].shape != values.shape:
        raise wrong_shapes("native_layer_norm_backward: input and grad_out must end in normalized_shape")
    groups = prod(values.shape[: -len(shape)])
    if any(given[name].numel() != groups for name in ("mean", "rstd")):
        raise wrong_shapes(f"native_layer_norm_backward: expected {groups} means and deviations")
    if any(given[name] is not None and tuple(given[name].shape) != shape for name in ("weight", "bias")):
        raise wrong_shapes(f"native_layer_norm_backward: expected weight and bias of shape {list(shape)}")


def _check_log_softmax(given: Given) -> None:
    """On the CPU it reads as many rows of `output` as `grad_output` has."""
    if given["grad_output"].shape != given["output"].shape:
        raise wrong_shapes("_log_softmax_backward_data: grad_output and output must have one shape")


def _like_forward(forward: str, *names: str) -> Callable[[Given], None]:
    """A check that `grad_output` has the shape that the forward gives, which takes the arguments `names`."""

    def check(given: Given) -> None:
        expected = _forward_shape(forward, [given[name] for name in names])
        if given["grad_output"].shape != expected:
            raise wrong_shapes(
                f"{forward} gives the shape {list(expected)}, its backward {list(given['grad_output'].shape)}"
            )

    return check


def _forward_shape(forward: str, arguments: list[Any]) -> torch.Size:
    on_meta = [torch.empty_like(each, device="meta") if isinstance(each, Tensor) else each for each in arguments]
    try:
        with torch.no_grad():
            result = resolve(f"aten.{forward}.default")(*on_meta)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise wrong_shapes(f"{forward}: {(str(error).splitlines() or [''])[0][:300]}") from None
    return (result[0] if isinstance(result, tuple) else result).shape


_POOL = ("self", "kernel_size", "stride", "padding")
_check_max_pool2d = _like_forward("max_pool2d_with_indices", *_POOL, "dilation", "ceil_mode")
_check_max_pool3d = _like_forward("max_pool3d_with_indices", *_POOL, "dilation", "ceil_mode")


def _check_max_pool2d_backward(given: Given) -> None:
    _check_max_pool2d(given)
    _check_places(given, 2)


def _check_max_pool3d_backward(given: Given) -> None:
    _check_max_pool3d(given)
    _check_places(given, 3)


def _check_places(given: Given, dims: int) -> None:
    """Indices are places in one channel of `self`, one for each number of `grad_output`."""
    indices = given["indices"]
    if indices.shape != given["grad_output"].shape or indices.dtype is not torch.int64:
        raise wrong_shapes("max_pool backward: expected one index of 64 bits for each number of grad_output")
    check_indices("max_pool backward's indices", indices, prod(given["self"].shape[-dims:]))


def _check_nll(given: Given) -> None:
    """self: [rows, classes] or [classes]; target: a class for each row."""
    values = given["self"]
    if values.dim() not in (1, 2):
        raise wrong_shapes("nll_loss_backward takes scores of one or two dimensions")
    _check_classes(given, values.shape[-1], values.shape[:-1])


def _check_nll2d(given: Given) -> None:
    """self: [rows, classes, height, width]; target: a class for each place."""
    values = given["self"]
    if values.dim() != 4:
        raise wrong_shapes("nll_loss2d_backward takes scores of four dimensions")
    _check_classes(given, values.shape[1], torch.Size((values.shape[0], *values.shape[2:])))


def _check_classes(given: Given, classes: int, places: torch.Size) -> None:
    target, weight, gradient = given["target"], given["weight"], given["grad_output"]
    if target.shape != places or gradient.shape != (places if given["reduction"] == 0 else ()):
        raise wrong_shapes(f"nll_loss backward: expected target and gradient for places of shape {list(places)}")
    if given["total_weight"].numel() != 1 or (weight is not None and weight.shape != (classes,)):
        raise wrong_shapes(f"nll_loss backward: expected one total_weight, and {classes} weights or none")
    check_indices("nll_loss backward's target", target, classes, but=given["ignore_index"])


def _check_cdist(given: Given) -> None:
    """grad, cdist: [..., p, r]; x1: [..., p, m]; x2: [..., r, m]."""
    one, other = given["x1"], given["x2"]
    if one.dim() < 2 or other.dim() < 2 or one.shape[-1] != other.shape[-1]:
        raise wrong_shapes("_cdist_backward takes two batches of vectors of one length")
    expected = (*_broadcast(one.shape[:-2], other.shape[:-2]), one.shape[-2], other.shape[-2])
    if given["grad"].shape != expected or given["cdist"].shape != expected:
        raise wrong_shapes(f"_cdist_backward: expected a gradient and distances of shape {list(expected)}")


def _check_prelu(given: Given) -> None:
    shape = given["self"].shape
    if given["grad_output"].shape != shape or _broadcast(shape, given["weight"].shape) != shape:
        raise wrong_shapes("_prelu_kernel_backward: grad_output must look like self, and weight broadcast to it")


def _broadcast(*shapes: torch.Size) -> torch.Size:
    try:
        return torch.broadcast_shapes(*shapes)
    except RuntimeError as error:
        raise wrong_shapes(f"shapes that do not fit: {str(error)[:300]}") from None


def _check_unfold(given: Given) -> None:
    whole = torch.empty(0, dtype=given["grad_in"].dtype, device="meta").new_empty(given["input_sizes"])
    expected = _forward_shape("unfold", [whole, given["dim"], given["size"], given["step"]])
    if given["grad_in"].shape != expected:
        raise wrong_shapes(f"unfold_backward: expected a gradient of shape {list(expected)}")


def _check_embedding(given: Given) -> None:
    gradient, indices = given["grad_output"], given["indices"]
    if gradient.dim() < 1 or gradient.shape[:-1] != indices.shape:
        raise wrong_shapes("embedding_dense_backward: expected one row of grad_output for each index")
    check_indices("embedding_dense_backward's indices", indices, given["num_weights"])


_AVERAGE = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
BACKWARD_CHECKS: dict[str, Callable[[Given], None]] = {
    "_cdist_backward": _check_cdist,
    "_log_softmax_backward_data": _check_log_softmax,
    "_prelu_kernel_backward": _check_prelu,
    "avg_pool2d_backward": _like_forward("avg_pool2d", *_AVERAGE),
    "avg_pool3d_backward": _like_forward("avg_pool3d", *_AVERAGE),
    "embedding_dense_backward": _check_embedding,
    "max_pool2d_with_indices_backward": _check_max_pool2d_backward,
    "max_pool3d_with_indices_backward": _check_max_pool3d_backward,
    "native_layer_norm_backward": _check_layer_norm,
    "nll_loss2d_backward": _check_nll2d,
    "nll_loss_backward": _check_nll,
    "unfold_backward": _check_unfold,
    **{
        f"{kind}_pad{dims}d_backward": _like_forward(f"{kind}_pad{dims}d", "self", "padding")
        for kind in ("reflection", "replication")
        for dims in (1, 2, 3)
    },
}
"""By operator: a function of a call's arguments that raises InvalidArgument where they do not fit."""
