"""What the service needs to be ready, part by part, and what is missing of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

logger = logging.getLogger(__name__)

RAY, STORAGE, DRAIN = "ray", "storage", "drain"
PARTS = (RAY, STORAGE, DRAIN)
"""What there is to be ready: Ray answers, the storage can be written to and is this service's, and it does not stop."""


class Readiness:
    """Called, it tells of each part None, or why it is not ready. Belongs to the event loop's thread.

    Capacity is no part of it: a service that is full is ready. missing: why parts are not ready from the beginning.
    """

    def __init__(self, missing: Mapping[str, str] | None = None, parts: Iterable[str] = PARTS) -> None:
        self._parts: dict[str, str | None] = dict.fromkeys(parts) | dict(missing or {})
        self._listeners: list[Callable[[], None]] = []

    def __call__(self) -> Mapping[str, str | None]:
        return dict(self._parts)

    @property
    def is_ready(self) -> bool:
        """Whether nothing is missing."""
        return not any(self._parts.values())

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called after each change."""
        self._listeners.append(listener)

    def set(self, part: str, why_not: str | None) -> None:
        """What is known of a part now. Changes are logged."""
        before = self._parts[part]
        if before == why_not:
            return
        self._parts[part] = why_not
        if why_not is None:
            logger.info("%s: ready", part)
        elif before is None:
            logger.warning("%s: not ready: %s", part, why_not)
        for listener in self._listeners:
            listener()
