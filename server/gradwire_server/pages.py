"""Lists in pages."""

from __future__ import annotations

import base64
import binascii
import re
from bisect import bisect_right
from collections.abc import Mapping
from typing import TypeVar

from gradwire_proto.errors import InvalidArgument

T = TypeVar("T")

DEFAULT_PAGE, LARGEST_PAGE = 100, 1000

_KEY = re.compile(r"[a-z0-9/-]{1,200}")


def page_of(items: Mapping[str, T], size: int, token: str) -> tuple[list[T], str]:
    """(the items of a page, ordered by their keys, the next page's token or ""). `size` 0: as many as is good.

    Keys have [a-z0-9/-] alone. Raises InvalidArgument PAGE_SIZE_INVALID, PAGE_TOKEN_INVALID.
    """
    if size < 0:
        raise InvalidArgument(f"expected 0 or more, got {size}", field="page_size", reason="PAGE_SIZE_INVALID")
    size = min(size or DEFAULT_PAGE, LARGEST_PAGE)
    keys = sorted(items)
    # The token is the last key that was seen: pages stay right when items come and go between them.
    first = bisect_right(keys, _decode_token(token)) if token else 0
    page = keys[first : first + size]
    more = first + size < len(keys)
    return [items[each] for each in page], _encode_token(page[-1]) if more else ""


def _encode_token(key: str) -> str:
    return base64.urlsafe_b64encode(key.encode()).decode()


def _decode_token(token: str) -> str:
    try:
        key = base64.urlsafe_b64decode(token.encode("ascii")).decode("ascii")
    except (ValueError, binascii.Error):
        key = ""
    if _KEY.fullmatch(key):
        return key
    raise InvalidArgument(
        "expected next_page_token of an earlier answer", field="page_token", reason="PAGE_TOKEN_INVALID"
    )
