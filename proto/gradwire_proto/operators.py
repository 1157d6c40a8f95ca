"""The operators that a graph may name, and the functions that they are. The list is operators.txt.

Names are resolved from the list, never from what a client sent. Importing this module does not import torch.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

GRAD_REGION = "higher_order.wrap_with_set_grad_enabled"
AUTOCAST_REGION = "higher_order.wrap_with_autocast"
REGIONS = frozenset({GRAD_REGION, AUTOCAST_REGION})
"""The operators that run a subgraph."""
COND = "higher_order.cond"
"""The operator that runs one of two subgraphs."""
CUSTOM_FUNCTION = "higher_order.custom_function"
"""The operator that calls a function of the graph which brings its own backward."""
RUN_GRAPHS = REGIONS | {COND, CUSTOM_FUNCTION}
"""The operators that are graphs themselves, and no function of PyTorch's or Python's."""


@cache
def allowed_operators() -> frozenset[str]:
    """Every name in operators.txt, such as "aten.linear.default"."""
    lines = (files("gradwire_proto") / "operators.txt").read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def has_schema(name: str) -> bool:
    """Whether an operator is one of PyTorch's overloads; the others are Python's arithmetic and regions."""
    return name.startswith("aten.")


@cache
def resolve(name: str) -> Callable[..., Any]:
    """The function that an allowed name stands for. Raises KeyError for a name that is not allowed."""
    if name not in allowed_operators() or name in RUN_GRAPHS:
        raise KeyError(name)
    return _python_functions()[name] if not has_schema(name) else _overload(name)


@cache
def schema_of(name: str) -> str:
    """An overload's schema as the installed PyTorch prints it; "" for an operator that has none."""
    return str(resolve(name)._schema) if has_schema(name) else ""  # type: ignore[attr-defined]


@cache
def name_of(target: Any) -> str:
    """The name under which a graph lists `target`, whether it is allowed or not."""
    for name, function in _python_functions().items():
        if function is target:
            return name
    if target.__class__.__name__ == "OpOverload":
        return str(target)
    if isinstance(target, _higher_order_class()):
        return f"higher_order.{target.name()}"
    return f"{getattr(target, '__module__', '?')}.{getattr(target, '__qualname__', repr(target))}"


def _overload(name: str) -> Any:
    import torch

    _, operator_name, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, operator_name), overload)


@cache
def _python_functions() -> dict[str, Callable[..., Any]]:
    import torch

    modules = {"operator": operator, "math": math, "torch": torch}
    names = (
        name.partition(".")[::2] for name in allowed_operators() if not has_schema(name) and name not in RUN_GRAPHS
    )
    return {f"{module}.{function}": getattr(modules[module], function) for module, function in names}


def _higher_order_class() -> type:
    import torch

    return torch._ops.HigherOrderOperator
