"""What a module's and a loss's code reads besides the module: globals, closures, defaults, attributes of objects.

An export bakes these values in, and so variants that are exported later must find them as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from gradwire.exporting.module_signature import refuse_change
from gradwire.exporting.tolerant_walk import TolerantWalk

_LITERALS = (bool, int, float, complex, str, bytes, type(None))


class ReadValues:
    """The values that the code of `modules` and `loss` reads, as they are while the first variants are exported.

    To be made before the first export; `settle` when it is done: what an export itself moves, such as a cache or a
    counter, is no change.
    """

    def __init__(self, modules: Iterable[nn.Module], loss: Callable[..., Any] | None) -> None:
        self._modules, self._loss = tuple(modules), loss
        self._left: frozenset[str] = frozenset()
        self._values = self._read()
        self._moving: set[str] = set()

    def settle(self, left: frozenset[str] = frozenset()) -> None:
        """Take the values as they are now, and from now on ignore those that are not what they were.

        left: attributes that a forward changes, and nothing depends on, as "layer.attribute".
        """
        self._left |= left
        before, self._values = self._values, self._read()
        self._moving |= {name for name, value in self._values.items() if before.get(name) != value}

    def hold(self) -> None:
        """Raise FailedPrecondition MODULE_CHANGED, naming the value, where one is not what it was."""
        now = self._read()
        for name, then in self._values.items():
            # A value that nothing leads to any more is one whose reader has changed, or is ignored.
            if name in now and name not in self._moving and now[name] != then:
                refuse_change(name, _literal(then), _literal(now[name]))

    def _read(self) -> dict[str, list[Any]]:
        walk = TolerantWalk(self._modules, self._left)
        for module in self._modules:
            for each in module.modules():
                if type(each).__module__.partition(".")[0] != "torch":
                    walk.method(each, "forward")
        if self._loss is not None and not isinstance(self._loss, nn.Module):
            with walk.section("the loss"):
                walk.visit(self._loss)
        return walk.sections


def _literal(parts: list[Any]) -> str | None:
    """The value of a section that is one number or text."""
    is_literal = len(parts) == 1 and type(parts[0]) is tuple and len(parts[0]) == 2 and parts[0][0] in _LITERALS
    if not is_literal:
        return None
    kind, value = parts[0]
    return value if kind in (float, complex) else repr(value)
