"""What a function reads besides its tensors, as a fingerprint: equal fingerprints compute the same.

An export bakes in the values that a function closes over, its globals, defaults and attributes. Exporting again at
every call would be slow; remembering by the function alone would silently compute with old values. So what is
remembered is looked up under the code and the contents of everything that the function can reach.

This fails closed: what is not known to be captured whole raises Unknown, and the caller exports anew. Known are plain
values, tensors, arrays and containers; functions, and instances of classes, that are written in Python, with all that
their code reads; and what torch and Python compute with, which is taken not to change.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import types
from abc import ABC, ABCMeta
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic

import numpy as np
import torch

from gradwire.code_reads import Unknown, reads, refuse_opaque_code

__all__ = ["Unknown", "Walk", "fingerprint"]

_PLAIN = (
    *(bool, int, str, bytes, type(None), type(...), type(NotImplemented), range),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_CONTAINERS = (tuple, list, set, frozenset)
_BUILTINS = {
    *("abs", "all", "any", "bool", "complex", "dict", "divmod", "enumerate", "filter", "float", "frozenset", "hash"),
    *("int", "isinstance", "issubclass", "len", "list", "map", "max", "min", "object", "pow", "property", "range"),
    *("reversed", "round", "set", "slice", "sorted", "staticmethod", "sum", "super", "tuple", "type", "zip"),
}
"""Builtins that compute with their arguments alone. `getattr`, `globals`, `open` and the like could read anything."""
_FUNCTION_HOMES = (
    *("torch.functional", "torch.nn.functional", "torch.nn.init", "torch.nn.modules"),
    *("torch.autograd", "torch._functorch", "torch._jit_internal"),
)
_BUILTIN_HOMES = ("math", "cmath", "_operator", "torch", "torch._C")
_CLASS_HOMES = ("torch.nn.modules", "torch.nn.parameter", "torch.autograd.grad_mode", "torch.amp.autocast_mode")
_CODE = (types.FunctionType, staticmethod, types.WrapperDescriptorType, types.BuiltinFunctionType)
_MOST_PARTS = 20_000
_MISSING = object()


def fingerprint(function: Callable[..., Any], arguments: Any = ()) -> tuple[Any, ...]:
    """A hashable value that changes when anything changes that `function(*arguments)` may compute with.

    The elements of tensors and arrays among the arguments, in tuples, lists and dicts, do not count: only their looks
    do. Holds code objects and digests; keeps none of the user's tensors alive. Raises Unknown where it cannot be told.
    """
    walk = Walk()
    try:
        walk.visit(function)
        walk.visit_argument(arguments)
    except RecursionError:
        raise Unknown("values that are nested too deep") from None
    return tuple(walk.parts)


class Walk:
    """Visits values, and all that they reach, and notes in `parts` what they are. Raises Unknown where that fails."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []  # so that no id is given twice during the walk

    def visit_argument(self, value: Any) -> None:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            self.parts.append((type(value), str(value.dtype), tuple(value.shape)))
        elif type(value) in (tuple, list):
            self.parts.append((type(value), len(value)))
            for item in value:
                self.visit_argument(item)
        elif type(value) is dict:
            self._sequence(dict, value)
            for item in value.values():
                self.visit_argument(item)
        else:
            self.visit(value)

    def visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _PLAIN:
            self.parts.append((kind, value))
        elif kind in (float, complex):
            self.parts.append((kind, repr(value)))  # tells -0.0 from 0.0, and finds nan equal to itself
        elif id(value) in self._seen:
            self.parts.append(("seen", self._seen[id(value)]))
        elif len(self.parts) > _MOST_PARTS:
            raise Unknown("more than is worth looking through")
        else:
            self._seen[id(value)] = self._place()
            self._alive.append(value)
            self._visit_object(value, kind)

    def _place(self) -> Any:
        """What an object is called where it is met again."""
        return len(self._seen)

    def _visit_object(self, value: Any, kind: type) -> None:
        if kind in (torch.Tensor, torch.nn.Parameter):
            self._tensor(value)
        elif kind is np.ndarray or isinstance(value, np.generic):
            if value.dtype.hasobject:
                raise Unknown(f"an array of {value.dtype}")
            self.parts.append((kind, value.dtype.str, value.shape, value.strides, _digest(value.tobytes())))
        elif kind in _CONTAINERS:
            self._sequence(kind, value)
        elif kind in (dict, OrderedDict):
            self._sequence(kind, [item for pair in value.items() for item in pair])
        elif kind is types.FunctionType:
            self._function(value)
        elif kind is types.MethodType:
            self._sequence(kind, (value.__func__, value.__self__))
        elif kind is functools.partial:
            self._sequence(kind, (value.func, value.args, value.keywords, vars(value)))
        elif kind in (staticmethod, classmethod):
            self._sequence(kind, (value.__func__,))
        elif kind is property:
            self._sequence(kind, (value.fget, value.fset, value.fdel))
        elif kind in (types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc):
            self._builtin(value)
        elif isinstance(value, types.ModuleType):
            raise Unknown(f"the module {value.__name__}, which may be asked for anything")
        elif isinstance(value, type):
            self._class(value)
        else:
            self._instance(value, kind)

    def _tensor(self, value: torch.Tensor) -> None:
        if value.layout is not torch.strided or value.is_quantized or value.device.type == "meta" or vars(value):
            raise Unknown("a tensor that is more than its elements")
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest = _digest(dense.view(-1).view(torch.uint8).numpy().data)
        looks = (str(value.dtype), str(value.device), tuple(value.shape), value.stride())
        self.parts.append((type(value), *looks, value.requires_grad, digest))

    def _sequence(self, kind: Any, items: Any) -> None:
        self.parts.append((kind, len(items)))
        for item in items:
            self.visit(item)

    def _function(self, function: types.FunctionType) -> None:
        self.parts.append(function.__code__)
        self._sequence("function", (function.__defaults__, function.__kwdefaults__, vars(function)))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        if _is_below(function.__globals__.get("__name__", ""), _FUNCTION_HOMES):
            # Of torch's own functions, what the user gave to them: `torch.func.grad(f)` holds f.
            held = map(_content, cells.values())
            self._sequence("cells", [value for value in held if not isinstance(value, types.ModuleType)])
            return
        refuse_opaque_code(function.__code__)
        for name, kind, attributes in reads(function.__code__):
            if kind == "global":
                self._read(function.__globals__.get(name, getattr(builtins, name, _MISSING)), attributes)
            # Names that are in no cell are locals of the function, for functions inside it.
            elif kind == "free" and name in cells:
                self._read(_content(cells[name]), attributes)

    def _read(self, value: Any, attributes: tuple[str, ...]) -> None:
        """What `value.a.b` gives, as far as `value` is a module."""
        for attribute in attributes:
            if isinstance(value, types.ModuleType):
                value = getattr(value, attribute, _MISSING)
        if value is _MISSING:
            raise Unknown("a name that is not bound")
        self.visit(value)

    def _builtin(self, value: Any) -> None:
        owner = getattr(value, "__self__", None)
        if isinstance(value, types.MethodDescriptorType):
            is_known = value.__objclass__.__module__.partition(".")[0] == "torch"
        elif isinstance(value, np.ufunc):
            is_known = value is getattr(np, value.__name__, None)
        elif owner is builtins:
            is_known = value.__name__ in _BUILTINS
        else:
            is_free = owner is None or isinstance(owner, types.ModuleType)
            is_known = is_free and _is_below(value.__module__ or "", _BUILTIN_HOMES) and value.__name__ != "from_file"
        if not is_known:
            raise Unknown(f"the builtin {value!r}")
        self.parts.append(value)

    def _class(self, value: type) -> None:
        self.parts.append((value.__module__, value.__qualname__))
        if _is_known_class(value):
            return
        if type(value) not in (type, ABCMeta):
            raise Unknown(f"a class with the metaclass {type(value).__qualname__}")
        for name, member in vars(value).items():
            # Other names with double underscores cannot be read: see _HARMLESS. __repr__ does not compute.
            is_special = name.startswith("__") and not isinstance(member, _CODE)
            if not is_special and name not in ("_abc_impl", "__repr__"):
                self.parts.append(name)
                self.visit(member)
        self._sequence("bases", value.__bases__)

    def _instance(self, value: Any, kind: type) -> None:
        # What a class that is not written in Python keeps cannot be seen.
        opaque = [base for base in kind.__mro__ if _is_known_class(base) and not _is_transparent(base)]
        if opaque or not hasattr(value, "__dict__"):
            raise Unknown(f"an object of type {kind.__qualname__}")
        self.visit(kind)
        self.visit(vars(value))


def _is_known_class(value: type) -> bool:
    if value.__module__ == "builtins":
        return value.__name__ in _BUILTINS or issubclass(value, BaseException)
    own = (torch.Tensor, ABC, Generic, *_PLAIN)
    return value in own or issubclass(value, np.generic) or _is_below(value.__module__, _CLASS_HOMES)


def _is_transparent(base: type) -> bool:
    return base in (object, ABC, Generic) or _is_below(base.__module__, ("torch.nn.modules",))


def _is_below(name: str, homes: tuple[str, ...]) -> bool:
    return any(name == home or name.startswith(home + ".") for home in homes)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        raise Unknown("a name that is not bound yet") from None


def _digest(elements: Any) -> bytes:
    return hashlib.blake2b(elements, digest_size=16).digest()
