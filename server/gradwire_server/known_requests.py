"""Of requests that are like ones before: how many are kept, and by what the next is recognised."""

from __future__ import annotations

from collections.abc import Hashable

MOST_KNOWN, MOST_SEEN = 256, 4096

FIXED_BYTES, KEPT_BYTES = 8 << 10, 256 << 10
"""Of requests with more bytes besides their tensors nothing is kept, and of all together no more. Parsed, they take up
to thirty times as much.
"""


def kind_of(raw: bytes) -> Hashable:
    """Its size, and what begins the request: the model's name, as a rule."""
    return len(raw), raw[: 2 + raw[1]] if len(raw) > 1 else raw
