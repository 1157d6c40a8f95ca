"""What a forward leaves behind in Python, such as counters: a graph cannot carry it, so nothing may depend on it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gradwire.exporting import safety_net
from gradwire.exporting.module_snapshot import Snapshot
from gradwire.exporting.safety_net import Run
from gradwire_proto.errors import ExportError


def refuse_dependence(
    snapshot: Snapshot, first: Run, run: Callable[[], Run], run_otherwise: Callable[[], Run]
) -> frozenset[str]:
    """The attributes that a forward changed, where no forward computes with them.

    snapshot: the modules before. first: what the forward gave that just ran. run: runs another one, in the modules'
    Python state of then; run_otherwise: with other inputs, which may fail. Leaves the modules as the last forward did.
    Raises ExportError EXPORT_PYTHON_STATE, naming the attribute, where what `run` gives depends on it.
    """
    changed = snapshot.changed()
    if not changed:
        return frozenset()
    numbers = snapshot.numbers()
    after_one = _values(numbers)
    moving: set[str] = set()
    # Once more on another past: of equal inputs, an average over forwards stays as it is.
    for before in (lambda: None, run_otherwise):
        with suppress(ExportError):
            before()
        snapshot.restore_buffers()
        try:
            safety_net.compare(first, run())
        except ExportError as error:
            raise _refusal(changed & numbers.keys() or changed, "the next forward gives something else") from error
        moving |= {name for name, values in _values(numbers).items() if values != after_one[name]}
    # What has settled, such as a flag "is initialised", makes no difference any more; a counter may later.
    for name in sorted(moving):
        snapshot.restore()
        untold = Untold()
        for holder, key in numbers[name]:
            holder[key] = untold
        try:
            run()
        except Exception as error:
            raise _refusal({name}, "the forward computes with it") from error
        if untold.asked:
            raise _refusal({name}, "the forward computes with it")
    return frozenset(changed)


class Untold:
    """A number that may be counted up and down, and kept, but not looked at: that is an error, and remembered."""

    def __init__(self) -> None:
        self.asked = False

    def _count(self, other: Any) -> Untold:
        if not isinstance(other, (bool, int, float, Untold)):
            self._tell()
        return self

    def _tell(self, *_: Any) -> Any:
        self.asked = True
        raise TypeError("this number changes with every forward")

    __add__ = __radd__ = __sub__ = __rsub__ = _count
    __bool__ = __int__ = __float__ = __index__ = __complex__ = __len__ = __iter__ = __hash__ = __str__ = _tell
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _tell
    __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = _tell
    __pow__ = __rpow__ = __neg__ = __pos__ = __abs__ = __invert__ = __round__ = __format__ = __repr__ = _tell
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = (
        _tell
    )


def _values(numbers: dict[str, list[tuple[Any, Any]]]) -> dict[str, list[Any]]:
    return {name: [_at(holder, key) for holder, key in places] for name, places in numbers.items()}


def _at(holder: Any, key: Any) -> Any:
    try:
        value = holder[key]
    except LookupError:
        return None
    return value if isinstance(value, (bool, int, float)) else type(value)


def _refusal(names: set[str], why: str) -> ExportError:
    name = min(names)
    others = f" (it changes {', '.join(sorted(names - {name}))} as well)" if len(names) > 1 else ""
    return ExportError(
        f"the forward changes the attribute {name!r}{others}, and {why}: a graph would keep the value of now for ever."
        " Register it as a buffer (a tensor, changed with tensor operators), or pass it as an input",
        field=name,
        reason="EXPORT_PYTHON_STATE",
    )
