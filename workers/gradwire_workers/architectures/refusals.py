"""What is said of names and values that an architecture must not have."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from gradwire_proto.errors import InvalidArgument


def unknown(name: Any, known: Iterable[str], *, what: str, field: str, reason: str) -> InvalidArgument:
    """The error for a name that is not among those known: it offers what comes near, or else says what there is."""
    known = sorted(known)
    near = get_close_matches(str(name), known, n=3, cutoff=0.6)
    offered = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known[:40]) or 'none'}"
    return InvalidArgument(f"{what} {str(name)[:80]!r}; {offered}", field=field, reason=reason)


def wrong_value(field: str, expected: str, value: Any) -> InvalidArgument:
    """The error for a value out of range, or of another kind."""
    return InvalidArgument(f"expected {expected}, got {value!r}"[:300], field=field, reason="OPTION_OUT_OF_RANGE")


def refused_by(name: str, error: Exception, field: str) -> InvalidArgument:
    """The error for a config that the class itself refuses."""
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:400]
    return InvalidArgument(
        f"{name} refuses its config: {text or type(error).__name__}", field=field, reason="ARCHITECTURE_INVALID"
    )
