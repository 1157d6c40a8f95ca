"""What to do about an output that no message can hold."""

from __future__ import annotations

from typing import Any


def remedy(output: Any) -> str:
    """The end of a sentence about an output that cannot be sent; empty where nothing is known to help."""
    # Of transformers, which nobody here has imported: that takes seconds.
    is_cache = type(output).__module__ == "transformers.cache_utils"
    return ". Training needs no cache of keys and values: set the config's use_cache=False" if is_cache else ""
