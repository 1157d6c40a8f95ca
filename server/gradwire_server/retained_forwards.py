"""Which forwards of a model its ranks retain, and until when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted
from gradwire_proto.values import Limits


class RetainedForwards:
    """At most `limits.retained_forwards`, each for `limits.retained_seconds` after its last use.

    `expire` is called, on the event loop, with the names of those whose time is over: the ranks still hold them.
    """

    def __init__(self, limits: Limits, expire: Callable[[tuple[str, ...]], None]) -> None:
        self._limits = limits
        self._expire = expire
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All that are retained."""
        return tuple(self._timers)

    def check_room(self) -> None:
        """Raise ResourceExhausted RETAINED_FORWARDS unless one more may be retained."""
        if len(self._timers) >= self._limits.retained_forwards:
            raise ResourceExhausted(
                f"{len(self._timers)} forwards are retained, as many as the server's setting retained_forwards allows:"
                " call backward, drop what it is not called for, or run under torch.no_grad()",
                reason="RETAINED_FORWARDS",
            )

    def keep(self, name: str) -> None:
        """The ranks retain it from now on, or go on to."""
        self.forget((name,))
        self._timers[name] = asyncio.get_running_loop().call_later(self._limits.retained_seconds, self._end, name)

    def check(self, name: str) -> None:
        """Raise FailedPrecondition RETAINED_GONE for a name of none."""
        if name not in self._timers:
            raise FailedPrecondition(
                f"no forward {name} is retained: it has been gone back through without keeping it, or released, or"
                " settings of the model were changed since (Model.update), or it was not used for"
                f" {self._limits.retained_seconds:g} s (the server's setting retained_seconds)",
                reason="RETAINED_GONE",
            )

    def forget(self, names: Iterable[str]) -> None:
        """They are retained no more. Names of none are passed over."""
        for name in names:
            timer = self._timers.pop(name, None)
            if timer is not None:
                timer.cancel()

    def close(self) -> None:
        """Forget all."""
        self.forget(list(self._timers))

    def _end(self, name: str) -> None:
        self.forget((name,))
        self._expire((name,))
