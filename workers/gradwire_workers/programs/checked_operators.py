"""PyTorch's operators that models need but that trust their tensors' values or shapes, with the check that is missing.

Without it a batch ends the process, or reads memory that is not its own. Batch norm's check is in batch_norm.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.operators import resolve
from gradwire_proto.values import Limits
from gradwire_workers.lifted_limits import are_lifted
from gradwire_workers.programs.checked_backwards import BACKWARD_CHECKS, check_indices, wrong_shapes


def checked(name: str, tensor_bytes: int = Limits().tensor_bytes) -> Callable[..., Any] | None:
    """The overload of an allowed name behind its check; None for one that needs none.

    tensor_bytes: how large a tensor may be that it makes for itself.
    """
    _, operator, overload = name.split(".")
    if operator in _DIVISIONS:
        # Division without a rounding mode is of floating point.
        return _behind(_check_division, name, tensor_bytes) if "mode" in overload else None
    check = _CHECKS.get(operator)
    return None if check is None else _behind(check, name, tensor_bytes)


@cache
def _behind(check: Callable[..., int | None], name: str, tensor_bytes: int) -> Callable[..., Any]:
    operator = resolve(name)
    signature = inspect.Signature(
        [
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY if each.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=each.default_value if each.has_default_value() else inspect.Parameter.empty,
            )
            for each in operator._schema.arguments  # type: ignore[attr-defined]
        ]
    )

    def run_checked(*arguments: Any, **keywords: Any) -> Any:
        given = signature.bind(*arguments, **keywords)
        given.apply_defaults()
        needed = check(given.arguments) or 0
        if needed > tensor_bytes and not are_lifted():
            raise ResourceExhausted(
                f"{name} needs a tensor of {needed} bytes for itself; the limit `tensor_bytes` is {tensor_bytes}",
                field="batch",
                reason="TENSOR_TOO_LARGE",
            )
        return operator(*arguments, **keywords)

    return run_checked


def _check_division(given: dict[str, Any]) -> None:
    """The smallest integer divided by -1 has no answer: processors trap."""
    dividend, divisor = given["self"], given["other"]
    if given["rounding_mode"] != "trunc":
        return
    dtype = torch.result_type(dividend, divisor)
    if dtype not in (torch.int32, torch.int64):
        return
    if bool(((torch.as_tensor(divisor) == -1) & (dividend.to(dtype) == torch.iinfo(dtype).min)).any()):
        raise InvalidArgument(
            f"{torch.iinfo(dtype).min} / -1 does not fit into {str(dtype)[6:]}",
            field="batch",
            reason="INTEGER_OVERFLOW",
        )


def _check_bags(given: dict[str, Any]) -> None:
    """Offsets rise from 0 and stay within the indices, and each index is a row of the weight."""
    weight, indices, offsets = given["weight"], given["indices"], given["offsets"]
    if weight.dim() != 2 or indices.dim() != 1 or offsets.dim() != 1:
        raise wrong_shapes("embedding_bag takes a weight of two dimensions, and indices and offsets of one")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < weight.shape[0]:
        raise InvalidArgument(
            f"index out of range: expected indices in [0, {weight.shape[0]})",
            field="batch.inputs",
            reason="INDEX_OUT_OF_RANGE",
        )
    if offsets.numel() == 0:
        return
    rising = bool((offsets[1:] >= offsets[:-1]).all())
    if not rising or int(offsets[0]) != 0 or int(offsets[-1]) > indices.numel():
        raise InvalidArgument(
            f"offsets must begin with 0, rise, and be at most {indices.numel()}, the number of indices",
            field="batch.inputs",
            reason="INDEX_OUT_OF_RANGE",
        )


def _check_random_pooling(given: dict[str, Any]) -> None:
    samples = given["random_samples"]
    if not bool(((samples >= 0) & (samples < 1)).all()):
        raise InvalidArgument(
            "fractional_max_pool: expected random samples in [0, 1)", field="batch", reason="INDEX_OUT_OF_RANGE"
        )


def _check_assertion(given: dict[str, Any]) -> None:
    """On CUDA, torch's own ends the process, later. A tensor that is no single truth value fails in torch."""
    holds = given["self"]
    if holds.numel() == 1 and not bool(holds):
        raise InvalidArgument(
            f"the program refuses the batch: {str(given.get('assert_msg') or 'an assertion failed')[:300]}",
            field="batch",
            reason="ASSERTION_FAILED",
        )


def _check_ctc(given: dict[str, Any]) -> int:
    """Labels are read as columns of log_probs. torch checks the lengths, on which its own memory depends.

    Gives the bytes of that.
    """
    log_probs, targets = given["log_probs"], given["targets"]
    input_lengths, lengths = (torch.as_tensor(given[f"{name}_lengths"]).reshape(-1) for name in ("input", "target"))
    batch = log_probs.shape[1] if log_probs.dim() == 3 else 1
    if log_probs.dim() not in (2, 3) or log_probs.numel() == 0 or targets.dim() not in (1, 2):
        raise wrong_shapes("ctc_loss takes log_probs of two or three dimensions, and targets of one or two")
    if input_lengths.numel() != batch or lengths.numel() != batch:
        raise wrong_shapes(f"ctc_loss takes one input length and one target length for each of {batch} rows")
    for name, each, most in (("input", input_lengths, log_probs.shape[0]), ("target", lengths, targets.numel())):
        if each.is_floating_point() or each.is_complex() or not 0 <= int(each.min()) <= int(each.max()) <= most:
            raise InvalidArgument(
                f"ctc_loss: expected whole {name}_lengths in [0, {most}]", field="batch", reason="INDEX_OUT_OF_RANGE"
            )
    if targets.dim() == 2:
        places = torch.arange(targets.shape[1], device=targets.device)
        if targets.shape[0] != batch or int(lengths.max()) > targets.shape[1]:
            raise wrong_shapes(f"ctc_loss takes {batch} rows of targets, at least as long as the target_lengths")
        targets = targets[places < lengths.to(targets.device)[:, None]]
    elif int(lengths.sum()) != targets.numel():
        raise wrong_shapes(f"ctc_loss: target_lengths add up to {int(lengths.sum())}, not {targets.numel()} targets")
    check_indices("ctc_loss's targets", targets, log_probs.shape[-1])
    return batch * log_probs.shape[0] * (2 * int(lengths.max()) + 1) * log_probs.element_size()


_DIVISIONS = frozenset({"div", "div_", "divide", "divide_"})
_CHECKS: dict[str, Callable[[dict[str, Any]], int | None]] = {
    **BACKWARD_CHECKS,
    "_assert_async": _check_assertion,
    "ctc_loss": _check_ctc,
    **dict.fromkeys(("embedding_bag", "_embedding_bag"), _check_bags),
    **dict.fromkeys(("fractional_max_pool2d", "fractional_max_pool3d"), _check_random_pooling),
}
