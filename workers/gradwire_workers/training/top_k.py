"""The largest elements of a gradient, instead of all."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(gradient: Tensor, fraction: float) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """(shape, row-major indices in order, values) of that fraction of the elements, the largest in magnitude.

    Rounded to a whole number, and one at least where there are any. NaN counts as infinite. Among elements of the same
    magnitude the first ones are taken, so that the same gradient gives the same elements everywhere.
    """
    flat = gradient.reshape(-1)
    count = max(round(fraction * flat.numel()), min(flat.numel(), 1))
    if count == flat.numel():
        indices = torch.arange(count, device=flat.device)
    else:
        magnitude = flat.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
        bound = magnitude.kthvalue(flat.numel() - count + 1).values
        above = (magnitude > bound).nonzero().view(-1)
        level = (magnitude == bound).nonzero().view(-1)[: count - above.numel()]
        indices = torch.cat((above, level)).sort().values
    return tuple(gradient.shape), indices, flat[indices]
