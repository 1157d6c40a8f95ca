"""What a module returns: flat, and how it is nested."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.output_remedies import remedy
from gradwire_proto.values import LeafRef, Structure


def flatten_outputs(output: Any) -> tuple[list[Any], Structure]:
    """(tensors and constants in order, None left out; how they are nested).

    Raises InvalidArgument OUTPUT_UNSUPPORTED for what no message can hold, such as a cache.
    """
    flat: list[Any] = []
    return flat, _walk(output, flat, 0)


def _walk(output: Any, flat: list[Any], depth: int) -> Structure:
    if output is None:
        return None
    if depth < 16 and isinstance(output, Mapping):
        return {str(key): _walk(item, flat, depth + 1) for key, item in output.items()}
    if depth < 16 and isinstance(output, (tuple, list)):
        items = [_walk(item, flat, depth + 1) for item in output]
        return items if isinstance(output, list) else tuple(items)
    if not isinstance(output, (Tensor, bool, int, float, str)):
        raise InvalidArgument(
            f"the module returns a {type(output).__name__}, which cannot be sent" + remedy(output),
            field="batch.inputs",
            reason="OUTPUT_UNSUPPORTED",
        )
    flat.append(output)
    return LeafRef(len(flat) - 1)
