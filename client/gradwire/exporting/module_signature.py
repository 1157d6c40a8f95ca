"""What a module was when its first variants were exported: a later variant must be of the same module."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from gradwire_proto.errors import FailedPrecondition

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_ELSEWHERE = {"training", "_parameters", "_buffers", "_modules", "_compiled_call_impl"}


class Signature:
    """What a module computes by, but for the values of parameters and buffers, which the service has.

    ignored: attributes that a forward itself changes, and does not depend on, as "layer.attribute".
    """

    def __init__(self, module: nn.Module, ignored: frozenset[str]) -> None:
        self._ignored = ignored
        self._training = module.training
        self._flags = {name: each.training for name, each in module.named_modules()}
        self._parts = _parts(module, ignored)

    def hold(self, module: nn.Module) -> None:
        """Give the module the train and eval flags of then, and raise FailedPrecondition for any other difference.

        The error's reason is MODULE_CHANGED; its message names the first part that is another. The caller preserves the
        module. Flags move with every local evaluation, and so they make no difference.
        """
        if module.training != self._training:
            module.train(self._training)
        for name, each in module.named_modules():
            each.training = self._flags.get(name, each.training)
        now = _parts(module, self._ignored)
        for name in (*self._parts, *now):
            then = self._parts.get(name)
            if name not in now or then != now[name]:
                refuse_change(name, _plain(then), _plain(now.get(name)))


def refuse_change(name: str, then: str | None, now: str | None) -> NoReturn:
    """Raise FailedPrecondition MODULE_CHANGED: what is called `name` changed, from and to what, where that is short."""
    from_to = f": {then} then, {now} now" if then is not None and now is not None else ""
    raise FailedPrecondition(
        f"{name} is not what it was when the model was created{from_to}. This batch needs another graph, and one of the"
        " module as it is now would not go with those that the model has: undo the change, or create another model",
        reason="MODULE_CHANGED",
    )


def _parts(module: nn.Module, ignored: frozenset[str]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for path, each in module.named_modules():
        prefix = f"{path}." if path else ""
        parts[f"module {path!r}" if path else "the module"] = (Particular(each), Particular(type(each).forward))
        for name, parameter in each._parameters.items():
            if parameter is not None:
                look = (Particular(parameter), parameter.requires_grad, parameter.dtype, parameter.shape)
                parts[f"parameter {prefix + name!r}"] = look
        for name, buffer in each._buffers.items():
            if buffer is not None and f"{prefix}_buffers" not in ignored:
                parts[f"buffer {prefix + name!r}"] = (buffer.dtype, buffer.shape)
        for name, value in each.__dict__.items():
            if name not in _ELSEWHERE and prefix + name not in ignored:
                parts[f"attribute {prefix + name!r}"] = _look(value, ())
    return parts


def _look(value: Any, outer: tuple[int, ...]) -> Any:
    """A value by which to know it again: plain ones by what they are, containers by their items, others by identity."""
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))
    if id(value) in outer:
        return "itself"
    outer = (*outer, id(value))
    if isinstance(value, dict):
        return [(type(value), len(value)), *((_look(k, outer), _look(v, outer)) for k, v in value.items())]
    if isinstance(value, (tuple, list, deque)):
        return [(type(value), len(value)), *(_look(item, outer) for item in value)]
    if isinstance(value, (set, frozenset)):
        return (type(value), frozenset(item if isinstance(item, _PLAIN) else Particular(item) for item in value))
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_inference():
        return (Particular(value), value._version)
    return Particular(value)


class Particular:
    """A certain object. It is kept alive only where nothing else tells it from a later one at its place."""

    def __init__(self, value: Any) -> None:
        self._id = id(value)
        try:
            self._value: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._value = lambda: value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Particular) and self._id == other._id and self._value() is other._value()

    def __hash__(self) -> int:
        return self._id


def _plain(look: Any) -> str | None:
    return look[1] if isinstance(look, tuple) and len(look) == 2 and isinstance(look[1], str) else None
