"""Tensors of a model chosen, given and replaced by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import islice

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.device_copies import to_device

_GLOB = frozenset("*?[")


def select(names: Sequence[str], known: Mapping[str, Tensor], *, field: str) -> dict[str, Tensor]:
    """Those that the names or globs match, in the order of `known`. InvalidArgument NO_MATCH where one has no match."""
    chosen = {name for index, pattern in enumerate(names) for name in matches(pattern, known, f"{field}[{index}]")}
    return {name: tensor for name, tensor in known.items() if name in chosen}


def select_parameters(
    wrt: Sequence[str] | None, parameters: Mapping[str, Tensor], aliases: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that require gradients among those that `wrt` matches; None matches all.

    `aliases`: parameters under every name that they have. A tensor has one name in what a glob matches: its own where
    that matches, otherwise its first alias that does.
    InvalidArgument at wrt[i]: NO_MATCH, or PARAMETER_FROZEN where a name, or all that a glob matches, is frozen.
    """
    if wrt is None:
        return {name: each for name, each in parameters.items() if each.requires_grad}
    known = {**parameters, **aliases}
    chosen: set[str] = set()
    for index, pattern in enumerate(wrt):
        where = f"wrt[{index}]"
        found = _once_each(matches(pattern, known, where), known)
        if not any(known[name].requires_grad for name in found):
            raise InvalidArgument(
                f"{pattern[:200]!r} does not require a gradient", field=where, reason="PARAMETER_FROZEN"
            )
        chosen.update(found)
    return {name: each for name, each in known.items() if name in chosen and each.requires_grad}


def matches(pattern: str, known: Mapping[str, Tensor], where: str) -> list[str]:
    """The names that `pattern`, one of them or a glob, matches. InvalidArgument NO_MATCH at `where`: there is none."""
    if pattern in known:
        return [pattern]
    found = [name for name in known if fnmatchcase(name, pattern)] if _GLOB & set(pattern) else []
    if not found:
        raise InvalidArgument(
            f"{pattern[:200]!r} matches no name{_near(pattern, known)}", field=where, reason="NO_MATCH"
        )
    return found


def _near(pattern: str, known: Mapping[str, Tensor]) -> str:
    """What may have been meant, in words. Not looked for among more names than that takes a moment."""
    near = get_close_matches(pattern[:200], [name for name in islice(known, 2000) if len(name) <= 200], n=3)
    return f"; near it: {', '.join(map(repr, near))}" if near else ""


def _once_each(names: Sequence[str], known: Mapping[str, Tensor]) -> list[str]:
    """The names without those of tensors that stand there before under another name."""
    first: dict[int, str] = {}
    for name in names:
        first.setdefault(id(known[name]), name)
    return list(first.values())


def check_gradients(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *, field: str = "gradients"
) -> dict[nn.Parameter, Tensor]:
    """A client's gradients by parameter. InvalidArgument at gradients["x"]: each names a parameter, and is like it."""
    checked: dict[nn.Parameter, Tensor] = {}
    for name, gradient in gradients.items():
        path, parameter = f'{field}["{name}"]', parameters.get(name)
        if not isinstance(parameter, nn.Parameter):
            raise InvalidArgument("the model has no such parameter", field=path, reason="NO_MATCH")
        if not parameter.requires_grad:
            raise InvalidArgument("the parameter does not require a gradient", field=path, reason="PARAMETER_FROZEN")
        if parameter in checked:
            raise InvalidArgument(
                "the parameter has one already, under another name", field=path, reason="GRADIENT_GIVEN_TWICE"
            )
        _check_like(gradient, parameter, path, same_type=True)
        checked[parameter] = to_device(gradient, parameter.device)
    return checked


def load(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], *, partial: bool) -> None:
    """Copy values by name, all or none, converted to the types that are there.

    InvalidArgument at tensors["x"] for names or shapes that do not fit, and for complex values where real ones are.
    """
    for name, tensor in tensors.items():
        if name not in into:
            raise InvalidArgument("the model has no such tensor", field=f'tensors["{name}"]', reason="NO_MATCH")
        # Of a complex number a copy into a real one would keep half.
        halved = tensor.is_complex() and not into[name].is_complex()
        _check_like(tensor, into[name], f'tensors["{name}"]', same_type=halved)
    missing = [name for name in into if name not in tensors]
    if missing and not partial:
        listed = ", ".join(repr(name) for name in missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise InvalidArgument(f"{len(missing)} tensors are missing: {listed}", field="tensors", reason="TENSOR_MISSING")
    with torch.no_grad():
        for name, tensor in tensors.items():
            into[name].copy_(tensor)


def _check_like(tensor: Tensor, expected: Tensor, field: str, *, same_type: bool) -> None:
    if tensor.shape == expected.shape and (tensor.dtype is expected.dtype or not same_type):
        return
    raise InvalidArgument(
        f"expected {_described(expected, same_type)}, got {_described(tensor, same_type)}",
        field=field,
        reason="SHAPE_MISMATCH" if tensor.shape != expected.shape else "DTYPE_MISMATCH",
    )


def _described(tensor: Tensor, with_type: bool) -> str:
    shape = str(list(tensor.shape))
    return str(tensor.dtype).removeprefix("torch.") + shape if with_type else f"shape {shape}"
