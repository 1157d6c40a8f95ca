"""What each precision means: torch.autocast around forward and loss, on ranks and wherever their graphs are checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradwire_proto.errors import InvalidArgument

PRECISIONS = ("fp32", "bf16", "fp16")
AUTOCAST_TYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What operators are cast to. Precision "fp32" casts none."""


@contextmanager
def autocast(precision: str) -> Iterator[None]:
    """Inside, operators compute as at this precision, whatever autocast is on around it. Backward belongs outside."""
    dtype = AUTOCAST_TYPES.get(precision)
    # Torch warns of a device that is not there.
    on_cuda = dtype is not None and torch.cuda.is_available()
    with (
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
        torch.autocast("cuda", dtype=dtype, enabled=on_cuda),
    ):
        yield


def check_precision(precision: str, field: str) -> str:
    """`precision`, which must be one that there is. InvalidArgument at `field`."""
    if precision not in PRECISIONS:
        raise InvalidArgument(
            f"expected one of {', '.join(PRECISIONS)}; got {precision[:80]!r}", field=field, reason="PRECISION_UNKNOWN"
        )
    return precision
