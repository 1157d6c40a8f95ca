"""What code reads, value by value, as far as it can be seen without running anything.

`captured` looks for a key under which an export may be used again, and gives up where it cannot tell. Here a doubt must
not stop anybody: what cannot be looked into is known by identity, and installed packages are taken not to change.
"""

from __future__ import annotations

import argparse
import builtins
import inspect
import site
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from torch import Tensor, nn

from gradwire.captured import Unknown, Walk
from gradwire.code_reads import reads
from gradwire.exporting.module_signature import Particular

_INSTALLED = tuple(
    {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()}
    | {site.getusersitepackages(), "<frozen"}
)
_LITERAL = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_HOLDERS = (types.SimpleNamespace, argparse.Namespace)
_FUNCTIONS = (types.FunctionType, types.MethodType)
_CALLED = ("__init__", "__call__", "forward")
_MOST_ITEMS = 1_000
_MOST_VISITS = 10_000
_DIGESTED_BYTES = 1 << 16
"""Above these, a value is known by identity, and a tensor also by its version."""
_NOTHING = object()


class TolerantWalk(Walk):
    """Notes each value that code reads in a section of its own: {what it is called: its parts}."""

    def __init__(self, modules: Iterable[nn.Module], left: frozenset[str]) -> None:
        super().__init__()
        self.sections: dict[str, list[Any]] = {}
        self._left = left
        self._visits = 0
        self._own: dict[int, str] = {}
        self._own_classes: set[type] = set()
        self._own_tensors: set[int] = set()
        self._bound: set[tuple[int, int]] = set()
        self._section = ""
        for module in modules:
            for path, each in module.named_modules():
                self._own.setdefault(id(each), f"{path}." if path else "")
                self._own_classes.add(type(each))
            self._own_tensors |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Inside, what is visited belongs to what is called `name`."""
        count = 2
        unique = name
        while unique in self.sections:
            unique, count = f"{name} ({count})", count + 1
        outer = self.parts, self._section
        self._section = unique
        self.parts = self.sections[unique] = []
        try:
            yield
        finally:
            self.parts, self._section = outer

    def visit(self, value: Any) -> None:
        parts, length = self.parts, len(self.parts)
        self._visits += 1
        if type(value) not in _LITERAL and self._visits > _MOST_VISITS:
            self.parts.append(Particular(value))
            return
        # What belongs to a user may do anything when it is looked at.
        try:
            super().visit(value)
        except Exception:
            self.parts = parts
            del parts[length:]
            parts.append(Particular(value))

    def method(self, owner: Any, name: str) -> None:
        """Visit the method and, for each class that defines it, what it reads of its owner."""
        member = vars(owner).get(name, _NOTHING) if hasattr(owner, "__dict__") else _NOTHING
        found = [member] if member is not _NOTHING else [vars(c)[name] for c in type(owner).__mro__ if name in vars(c)]
        for each in found:
            for function in _functions(each):
                is_users = function.__closure__ or not _is_installed(function.__code__.co_filename)
                if is_users and id(function) not in self._seen:
                    with self.section(f"the code of {_called(function)}"):
                        self.visit(function)
                self._first_argument(function, owner)

    def _place(self) -> Any:
        return (self._section, len(self.parts))

    def _first_argument(self, function: types.FunctionType, owner: Any) -> None:
        if (id(function), id(owner)) in self._bound or _is_installed(function.__code__.co_filename):
            return
        self._bound.add((id(function), id(owner)))
        for _, kind, attributes in reads(function.__code__):
            if kind == "first" and attributes:
                self._read_by(function, function.__code__.co_varnames[0], owner, attributes)

    def _function(self, function: types.FunctionType) -> None:
        self.parts.append(function.__code__)
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if _is_installed(function.__code__.co_filename):
            # Decorators of torch and others hold the user's function.
            for cell in cells.values():
                content = _content(cell)
                if isinstance(content, _FUNCTIONS):
                    self.visit(content)
            return
        names = inspect.signature(function, follow_wrapped=False).parameters.values()
        for parameter in names:
            if parameter.default is not parameter.empty:
                with self.section(f"the default of {parameter.name!r} in {_called(function)}"):
                    self.visit(parameter.default)
        for name, kind, attributes in reads(function.__code__):
            if kind == "global":
                value = function.__globals__.get(name, getattr(builtins, name, _NOTHING))
                self._read_by(function, name, value, attributes)
            elif kind == "free" and name in cells and name != "__class__":
                self._read_by(function, name, _content(cells[name]), attributes)

    def _read_by(self, function: types.FunctionType, name: str, value: Any, attributes: tuple[str, ...]) -> None:
        """Visit what `name.a.b` is in the function, as far as it can be followed without running anything."""
        for attribute in attributes:
            following = self._attribute(value, attribute)
            if following is _NOTHING:
                return
            if following is None:
                break
            name, (value,) = f"{name}.{attribute}", following
        if not isinstance(value, types.ModuleType) and id(value) not in self._own:
            with self.section(f"{name!r}, which {_called(function)} reads,"):
                self.visit("not bound" if value is _NOTHING else value)

    def _attribute(self, value: Any, attribute: str) -> Any:
        """(the attribute,), None where it is the value itself that matters, or _NOTHING where all is visited."""
        if isinstance(value, (types.ModuleType, types.FunctionType)):
            return (vars(value)[attribute],) if attribute in vars(value) else _NOTHING
        if isinstance(value, (*_CONTAINERS, *_LITERAL, Tensor, np.ndarray, types.MethodType)) or value is _NOTHING:
            return None
        if isinstance(value, type):
            member = _member(value, attribute)
            return _NOTHING if member is _NOTHING else (getattr(member, "__func__", member),)
        if id(value) in self._own and (attribute == "training" or self._own[id(value)] + attribute in self._left):
            return _NOTHING  # Flags are put right, and the others make no difference.
        held = getattr(value, "__dict__", {})
        for place in (held, *(held.get(name, {}) for name in ("_modules", "_parameters", "_buffers"))):
            if isinstance(place, dict) and attribute in place:
                return (place[attribute],)
        member = _member(type(value), attribute)
        if isinstance(member, (types.FunctionType, staticmethod, classmethod, property)):
            self.method(value, attribute)
            return _NOTHING
        if inspect.ismemberdescriptor(member):
            return (member.__get__(value),)
        return _NOTHING if member is _NOTHING else (member,)

    def _visit_object(self, value: Any, kind: type) -> None:
        if kind is types.MethodType:
            self.parts.append(kind)
            for function in _functions(value.__func__):
                self.visit(function)
                self._first_argument(function, value.__self__)
        elif isinstance(value, _CONTAINERS):
            items = [item for pair in value.items() for item in pair] if isinstance(value, dict) else list(value)
            if len(items) > _MOST_ITEMS:
                raise Unknown("more than is worth looking through")
            self._sequence((kind.__module__, kind.__qualname__), items)
        elif isinstance(value, np.ndarray) and value.nbytes > _DIGESTED_BYTES:
            raise Unknown("more than is worth looking through")
        else:
            super()._visit_object(value, kind)

    def _tensor(self, value: Tensor) -> None:
        if id(value) in self._own_tensors:
            self.parts.append("of the model")
        elif value.nbytes <= _DIGESTED_BYTES:
            super()._tensor(value)
        else:
            self.parts.append((Particular(value), None if value.is_inference() else value._version))

    def _builtin(self, value: Any) -> None:
        self.parts.append(Particular(value))

    def _class(self, value: type) -> None:
        # By its name: a class may count its instances, and a notebook defines it again.
        self.parts.append((value.__module__, value.__qualname__))
        if not _is_installed_class(value) and value not in self._own_classes:
            for name in _CALLED:
                for function in _functions(vars(value).get(name)):
                    self.visit(function)

    def _instance(self, value: Any, kind: type) -> None:
        self.parts.append((kind.__module__, kind.__qualname__))
        if id(value) in self._own:
            return
        if _is_installed_class(kind) and not isinstance(value, (nn.Module, *_HOLDERS)):
            raise Unknown("an object of an installed class")
        for name, item in getattr(value, "__dict__", {}).items():
            with self.section(f"attribute {name!r} of {kind.__qualname__}"):
                self.visit(item)
        for name in ("__call__", "forward"):
            if not _is_installed_class(kind):
                self.method(value, name)


def _functions(member: Any) -> list[types.FunctionType]:
    """The functions that a method is: a decorator's, and the one that it decorates."""
    members = (member.fget,) if isinstance(member, property) else (getattr(member, "__func__", member),)
    found = []
    for each in members:
        while isinstance(each, types.FunctionType) and each not in found:
            found.append(each)
            each = getattr(each, "__wrapped__", None)
    return found


def _member(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), _NOTHING)


def _content(cell: types.CellType) -> Any:
    with suppress(ValueError):
        return cell.cell_contents
    return _NOTHING


def _is_installed(path: str) -> bool:
    return path.startswith(_INSTALLED)


def _is_installed_class(kind: type) -> bool:
    module = sys.modules.get(kind.__module__)
    path = getattr(module, "__file__", None)
    return kind.__module__ in sys.builtin_module_names or (isinstance(path, str) and _is_installed(path))


def _called(function: types.FunctionType) -> str:
    return function.__qualname__.rpartition("<locals>.")[2]
