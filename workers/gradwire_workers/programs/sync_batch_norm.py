"""Batch normalisation over the rows of all ranks: the same numbers as over one batch. For the CPU too, unlike torch's.

Or over each rank's own rows, as under DistributedDataParallel without SyncBatchNorm.

Means and squared deviations merge exactly: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for
computing sample variances" (1979).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs.batch_norm import checked_batch_norm, one_value_per_channel


class SyncBatchNorm:
    """What takes batch norm's place in a program that runs on several ranks: `batch_norm`.

    Inside `over_ranks` it normalises over all ranks' rows; outside, and with own_rows inside too, over the rows that it
    is given. Running statistics move on rank 0 alone then: the caller gives them to the others.
    """

    def __init__(self, *, own_rows: bool = False) -> None:
        self._own_rows = own_rows
        self._groups: ProcessGroups | None = None
        self._has_rows = True
        self._row_by_row = False

    @contextmanager
    def over_ranks(self, groups: ProcessGroups, *, has_rows: bool) -> Iterator[None]:
        """has_rows: whether this rank's rows count; False for a dummy row."""
        self._groups, self._has_rows = groups, has_rows
        try:
            yield
        finally:
            self._groups = None

    @contextmanager
    def synchronised(self) -> Iterator[None]:
        """Inside, it normalises over all ranks' rows, with own_rows too."""
        kept, self._own_rows = self._own_rows, False
        try:
            yield
        finally:
            self._own_rows = kept

    @contextmanager
    def row_by_row(self) -> Iterator[None]:
        """Inside, it normalises with mean 0 and variance 1, and changes no statistics."""
        self._row_by_row = True
        try:
            yield
        finally:
            self._row_by_row = False

    def batch_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Tensor:
        """aten.batch_norm. Raises InvalidArgument where the rows that it normalises over have one value per channel."""
        if self._row_by_row and training:
            # Statistics of half precision are kept in float32, as weights are.
            zeros = _precise(input.new_zeros(input.size(1)))
            mean, variance = zeros, zeros + 1
            return torch.batch_norm(input, weight, bias, mean, variance, False, momentum, eps, cudnn_enabled)
        if self._groups is None or not training:
            return checked_batch_norm(
                input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
            )
        if self._own_rows:
            statistics = (None, None) if self._groups.rank else (running_mean, running_var)
            return _over_own_rows(input, weight, bias, *statistics, momentum, eps, cudnn_enabled)
        mean, variance, count = _statistics(input, self._groups, self._has_rows)
        if count <= 1:
            raise one_value_per_channel(tuple(input.shape))
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
        return _Normalise.apply(  # type: ignore[return-value]
            input, weight, bias, mean, variance, eps, count, self._groups, self._has_rows
        )


def is_over_ranks(node: Any) -> bool:
    """Whether a node of autograd's graph is the backward of batch norm over all ranks' rows."""
    return isinstance(node, _Normalise._backward_cls)  # type: ignore[attr-defined]


def _over_own_rows(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    if input.numel() == input.size(1):
        raise one_value_per_channel(tuple(input.shape), of_rank=True)
    # A backward later takes offence at a change of what it was given, though it does not read it: copies.
    moved = [None if each is None else each.clone() for each in (running_mean, running_var)]
    output = torch.batch_norm(input, weight, bias, moved[0], moved[1], True, momentum, eps, cudnn_enabled)
    for statistic, now in zip((running_mean, running_var), moved, strict=True):
        if statistic is not None and now is not None:
            statistic.copy_(now)
    return output


def _statistics(input: Tensor, groups: ProcessGroups, has_rows: bool) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all ranks, and how many values each channel has."""
    with torch.no_grad():
        channels = input.size(1)
        values = _precise(input)
        mine = values.new_zeros(2 * channels + 1)
        if has_rows:
            count = input.numel() // channels
            mean, variance = torch.batch_norm_update_stats(values, None, None, 0.0)
            mine[:channels], mine[channels:-1], mine[-1] = mean, variance * count, count
        everyone = groups.all_gather(mine)
        counts = everyone[:, -1:]
        total = counts.sum()
        means, deviations = everyone[:, :channels], everyone[:, channels:-1]
        # Division last, so that a mean that all ranks share stays what it is.
        mean = (means * counts).sum(0) / total
        variance = (deviations + counts * (means - mean).square()).sum(0) / total
        return mean, variance, total.item()


class _Normalise(torch.autograd.Function):
    """(input - mean) / sqrt(variance + eps) * weight + bias, where mean and variance came from all ranks' inputs.

    With fixed statistics that is torch's batch norm in evaluation, whose fast kernels serve here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        count: float,
        groups: ProcessGroups,
        has_rows: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, weight, mean, variance)
        ctx.weight_type = None if weight is None else weight.dtype
        ctx.bias_type = None if bias is None else bias.dtype
        ctx.eps, ctx.count, ctx.groups, ctx.has_rows = eps, count, groups, has_rows
        weight, bias = (None if each is None else each.to(mean.dtype) for each in (weight, bias))
        return _normalised(_precise(input), weight, bias, mean, variance, eps).to(input.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        input, weight, mean, variance = ctx.saved_tensors
        gradient, values = _precise(gradients[0]).contiguous(), _precise(input)
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, values, None, mean, variance, None, None, False, ctx.eps, [False, True, True]
        )
        sums = torch.stack([of_bias, of_weight])
        if not ctx.has_rows:
            # A dummy row: it takes part in the collective and in nothing else.
            sums.zero_()
            of_bias, of_weight = torch.zeros_like(of_bias), torch.zeros_like(of_weight)
        ctx.groups.all_reduce(sums)
        of_input = None
        if ctx.needs_input_grad[0] and not ctx.has_rows:
            of_input = torch.zeros_like(input)
        elif ctx.needs_input_grad[0]:
            of_bias_mean, of_weight_mean = sums / ctx.count
            factor = (variance + ctx.eps).rsqrt()
            if weight is not None:
                factor = factor * weight
            # What normalising with the batch's own statistics takes away.
            taken = _normalised(values, of_weight_mean, of_bias_mean, mean, variance, ctx.eps)
            of_input = torch.sub(gradient, taken, out=taken).mul_(factor.view(_per_channel(input))).to(input.dtype)
        return (
            of_input,
            of_weight.to(ctx.weight_type) if ctx.needs_input_grad[1] else None,
            of_bias.to(ctx.bias_type) if ctx.needs_input_grad[2] else None,
            *[None] * 6,
        )


def _normalised(
    values: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(values, weight, bias, mean, variance, False, 0.0, eps, False)


def _precise(tensor: Tensor) -> Tensor:
    """Half precision in float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _per_channel(input: Tensor) -> list[int]:
    return [1, -1] + [1] * (input.dim() - 2)
