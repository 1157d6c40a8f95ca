"""What a function reads besides its arguments, as a fingerprint: equal fingerprints compute the same.

An export bakes in the values that a function closes over, its globals, defaults and attributes. Exporting again at
every call would be slow; remembering by the function alone would silently compute with old values. So what is
remembered is looked up under the function's code and the contents of everything of the user's that the code names.
Libraries (installed packages and the standard library) are taken not to change.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import sys
import sysconfig
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_LIBRARIES = tuple({sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class Unknown(Exception):
    """The function reads something whose contents cannot be told: do not remember it."""


def fingerprint(function: Callable[..., Any]) -> tuple[Any, ...]:
    """A hashable value that changes when anything changes that `function` may compute with.

    Holds code objects and digests; keeps none of the user's tensors alive. Raises Unknown where that cannot be told.
    """
    parts: list[Any] = []
    _Walk(parts).visit(function)
    return tuple(parts)


def content(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A tensor's type, shape and a digest of its elements."""
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    digest = hashlib.blake2b(dense.view(-1).view(torch.uint8).numpy().data, digest_size=16).digest()
    return (str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, digest)


class _Walk:
    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no id is given twice during the walk

    def visit(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._parts.append((type(value), repr(value) if isinstance(value, float) else value))
            return
        if id(value) in self._seen:
            self._parts.append(("seen", self._seen[id(value)]))
            return
        self._seen[id(value)] = len(self._seen)
        self._alive.append(value)
        self._visit_object(value)

    def _visit_object(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._parts.append(("tensor", *content(value)))
        elif isinstance(value, (np.ndarray, np.generic)):
            if value.dtype.hasobject:
                raise Unknown(f"an array of {value.dtype}")
            digest = hashlib.blake2b(value.tobytes(), digest_size=16).digest()
            self._parts.append(("array", value.dtype.str, value.shape, digest))
        elif isinstance(value, (tuple, list)):
            self._sequence(value)
        elif isinstance(value, (set, frozenset)):
            self._sequence(sorted(value, key=repr), kind=set)
        elif isinstance(value, dict):
            self._sequence([item for pair in value.items() for item in pair], kind=dict)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._sequence((value.__func__, value.__self__), kind="method")
        elif isinstance(value, functools.partial):
            self._sequence((value.func, value.args, value.keywords), kind="partial")
        elif isinstance(value, (types.ModuleType, type)) or (callable(value) and not hasattr(value, "__dict__")):
            self._named(value)
        else:
            self._instance(value)

    def _sequence(self, items: Any, kind: Any = None) -> None:
        self._parts.append((kind or type(items), len(items)))
        for item in items:
            self.visit(item)

    def _function(self, function: types.FunctionType) -> None:
        if _is_library(function.__module__):
            self._named(function)
            return
        self._parts.append(function.__code__)
        self._sequence(function.__defaults__ or ())
        self._sequence(tuple((function.__kwdefaults__ or {}).items()))
        for cell in function.__closure__ or ():
            try:
                self.visit(cell.cell_contents)
            except ValueError:  # not bound yet
                self._parts.append("empty")
        names, attributes = _names(function.__code__)
        for name in names:
            if name in function.__globals__:
                self._global(name, function.__globals__[name], attributes)

    def _global(self, name: str, value: Any, attributes: tuple[str, ...]) -> None:
        self._parts.append(name)
        self.visit(value)
        if isinstance(value, types.ModuleType) and not _is_library(value.__name__):
            # `settings.rate`: of a module of the user's, what the code may read.
            for attribute in attributes:
                if attribute in vars(value):
                    self._parts.append(attribute)
                    self.visit(vars(value)[attribute])

    def _named(self, value: Any) -> None:
        """A thing that its name tells: a library's, a module, or a class. Members of the user's classes count too."""
        module = getattr(value, "__module__", None) or ""
        self._parts.append((module, getattr(value, "__qualname__", getattr(value, "__name__", "")), type(value)))
        if isinstance(value, type) and not _is_library(module):
            for name, wrapped in vars(value).items():
                member = getattr(wrapped, "__func__", wrapped)  # of static methods and class methods
                constant = isinstance(member, (torch.Tensor, np.ndarray, tuple, list, dict, *_PLAIN))
                if isinstance(member, types.FunctionType) or (constant and not name.startswith("__")):
                    self._parts.append(name)
                    self.visit(member)
            for base in value.__bases__:
                self.visit(base)

    def _instance(self, value: Any) -> None:
        if not hasattr(value, "__dict__"):
            raise Unknown(f"an object of type {type(value).__qualname__}")
        self.visit(type(value))
        self.visit(vars(value))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(globals, attributes) that the code names, nested functions included."""
    loads = ("LOAD_GLOBAL", "LOAD_NAME")
    read = {item.argval: None for item in dis.get_instructions(code) if item.opname in loads}
    attributes = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner_read, inner_attributes = _names(constant)
            read.update(dict.fromkeys(inner_read))
            attributes.update(dict.fromkeys(inner_attributes))
    return tuple(read), tuple(attributes)


@functools.cache
def _is_library(module_name: str | None) -> bool:
    top = (module_name or "").partition(".")[0]
    if top in sys.builtin_module_names or (top in sys.stdlib_module_names and top != "__main__"):
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return bool(file) and any(file.startswith(folder + "/") for folder in _LIBRARIES)
