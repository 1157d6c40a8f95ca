"""What the service knows about a request besides its message."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request. `arrived` and `deadline` are seconds of time.monotonic(); `deadline` None: there is none.

    `request_id` is the caller's, None where it gave none; `body` is a digest of method and message: the same request id
    with another body is another request.
    """

    arrived: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    request_id: str | None = None
    body: bytes = b""
