"""Which names the code of a function reads, by looking at its bytecode."""

from __future__ import annotations

import dis
import functools
import itertools
import types

_HARMLESS = {"__init__", "__call__", "__class__", "__name__", "__setattr__", "__delattr__"}
"""Attributes with double underscores that lead to nothing that is not visited anyway."""
_OPAQUE_LOADS = {
    *("LOAD_NAME", "LOAD_LOCALS", "LOAD_CLASSDEREF", "LOAD_BUILD_CLASS", "LOAD_FROM_DICT_OR_GLOBALS"),
    *("LOAD_FROM_DICT_OR_DEREF", "IMPORT_NAME", "STORE_GLOBAL", "DELETE_GLOBAL"),
}
_KINDS = {"LOAD_GLOBAL": "global", "LOAD_DEREF": "free"}


class Unknown(Exception):
    """The function reads something whose contents cannot be told: do not remember it."""


@functools.lru_cache(maxsize=1024)
def refuse_opaque_code(code: types.CodeType) -> None:
    """Raise Unknown for code that may reach more than `reads` tells."""
    for item in dis.get_instructions(code):
        if item.opname in _OPAQUE_LOADS:
            raise Unknown(f"code with {item.opname}")
        if _takes_attribute(item) and item.argval.startswith("__") and item.argval not in _HARMLESS:
            raise Unknown(f"code that reads {item.argval}")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            refuse_opaque_code(constant)


@functools.lru_cache(maxsize=1024)
def reads(code: types.CodeType) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(name, kind, the attributes taken of it at once) of what the code reads, functions inside it included.

    kind: "global", "free", or "first" for the function's own first argument, such as `self`.
    """
    found: dict[tuple[str, str, tuple[str, ...]], None] = {}
    instructions = [item for item in dis.get_instructions(code) if item.opname not in ("EXTENDED_ARG", "PUSH_NULL")]
    first = code.co_varnames[:1] if code.co_argcount else ()
    for index, item in enumerate(instructions):
        name, kind = item.argval, _KINDS.get(item.opname)
        if "LOAD_FAST" in item.opname:
            # Newer Pythons load or store another with it, and the attributes are those of the latter.
            name = name[-1] if isinstance(name, tuple) else name
            kind = "first" if name in first else None
        elif kind == "free" and name in first:
            kind = "first"  # Functions inside share it.
        if kind is not None:
            followers = itertools.takewhile(_takes_attribute, instructions[index + 1 :])
            found[name, kind, tuple(item.argval for item in followers)] = None
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            for name, kind, attributes in reads(constant):
                if kind == "free" and name in first:
                    found[name, "first", attributes] = None
                elif kind != "first":
                    found[name, kind, attributes] = None
    return tuple(found)


def _takes_attribute(item: dis.Instruction) -> bool:
    return item.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
