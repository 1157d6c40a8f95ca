"""First weights from a folder of safetensors that the operator allows.

No pickles, no links that lead out of the folder, and no name that the module does not have.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import StateTensor

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_INDEX_BYTES = 64 << 20
_MOST_NAMED = 8


def load_weights(
    tensors: Sequence[StateTensor], values: Mapping[str, Tensor], root: str | None, path: str, field: str
) -> None:
    """Give a module the values of the folder `path` below `root`, in place, in the module's own element types.

    tensors, values: the module's, as `describe_tensors` gives them. Of tied tensors one name will do. Numbers take
    another width of their kind and no other kind: complex ones would lose a part, fractions be cut off.
    Raises FailedPrecondition WEIGHTS_NOT_ALLOWED where the operator allows none; InvalidArgument WEIGHTS_NOT_FOUND,
    WEIGHTS_INVALID, or WEIGHTS_MISMATCH, which names what is missing, unexpected, of another shape or kind, or tied and
    of two values; nothing was changed then, but for the last.
    """
    if root is None:
        raise FailedPrecondition(
            "this service allows no weights: its setting weights_folder names no folder",
            field=field,
            reason="WEIGHTS_NOT_ALLOWED",
        )
    files = _files(root, path, field)
    known = {each.name: each for each in tensors if each.role in ("parameter", "buffer")}
    owner = {each.name: each.alias_of or each.name for each in known.values()}
    there = _headers(files, root, path, field)
    found = {owner[name] for name in there if name in owner}
    _refuse(field, "lacks", [name for name, own in owner.items() if name == own and name not in found])
    _refuse(field, "has what the module has not:", [name for name in there if name not in known])
    wrong = [
        f"{name} is {list(shape)} and not {list(known[name].shape)}"
        for name, (shape, _) in there.items()
        if shape != known[name].shape
    ]
    _refuse(field, "has other shapes:", wrong)
    wrong = [
        f"{name} is {dtype} and not {known[name].dtype}"
        for name, (_, dtype) in there.items()
        if _kind(dtype) != _kind(known[name].dtype)
    ]
    _refuse(field, "has numbers of other kinds:", wrong)
    _read(files, values, owner, field)


def _read(files: Sequence[str], values: Mapping[str, Tensor], owner: Mapping[str, str], field: str) -> None:
    first: dict[str, str] = {}
    different = []
    for file in files:
        with _opened(file, field) as stored, torch.no_grad():
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                value, found = values[name], stored.get_tensor(name)
                before = first.setdefault(owner[name], name)
                if before == name:
                    value.copy_(found)
                elif not _same(value, found):
                    different.append(f"{before} and {name}")
    _refuse(field, "has two values for what is one tensor in the module:", different)


def _same(value: Tensor, found: Tensor) -> bool:
    """Bit for bit in the module's type: NaN too."""
    value, found = (each.detach().reshape(-1).view(torch.uint8) for each in (value, found.to(value)))
    return torch.equal(value, found)


def _kind(dtype: str) -> str:
    """What kind of numbers a type has: by torch's name of it (float32) as by that in a file (F32, BF16, F8_E4M3)."""
    letter = dtype.lower().replace("bf", "f")[0]
    # Whole numbers are one kind, signed or not.
    return "i" if letter == "u" else letter


def _files(root: str, path: str, field: str) -> list[str]:
    """The files of the folder, every one of them inside the root, whatever links there are."""
    folder = _inside(root, os.path.join(root, path), path, field)
    if not os.path.isdir(folder):
        raise _not_found(path, field)
    if os.path.isfile(os.path.join(folder, _INDEX)):
        index = _inside(root, os.path.join(folder, _INDEX), path, field)
        names = _shards(index, field)
    else:
        names = [_WHOLE]
    files = [_inside(root, os.path.join(folder, name), path, field) for name in names]
    for name, file in zip(names, files, strict=True):
        if not os.path.isfile(file):
            raise _not_found(f"{path}/{name}", field)
    return files


def _inside(root: str, path: str, given: str, field: str) -> str:
    real, top = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        # Nothing is said of what lies outside.
        raise _not_found(given, field)
    return real


def _not_found(path: str, field: str) -> InvalidArgument:
    return InvalidArgument(
        f"there are no weights {path[:80]!r}: expected a folder with {_WHOLE}, or {_INDEX} and the files that it names",
        field=field,
        reason="WEIGHTS_NOT_FOUND",
    )


def _shards(index: str, field: str) -> list[str]:
    try:
        if os.path.getsize(index) > _INDEX_BYTES:
            raise ValueError(f"it has more than {_INDEX_BYTES} bytes")
        with open(index, encoding="utf-8") as file:
            names = list(dict.fromkeys(json.load(file)["weight_map"].values()))
        if not all(isinstance(name, str) and _SHARD.fullmatch(name) for name in names):
            raise ValueError("it names a file that is no *.safetensors beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(f"{_INDEX}: {error}"[:300], field=field, reason="WEIGHTS_INVALID") from None
    return names


def _headers(files: list[str], root: str, path: str, field: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, element type) by name."""
    looks: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        with _opened(file, field) as stored:
            for name in stored.keys():  # noqa: SIM118 (no mapping)
                if name in looks:
                    raise InvalidArgument(f"{name} stands in two files", field=field, reason="WEIGHTS_INVALID")
                look = stored.get_slice(name)
                looks[name] = tuple(look.get_shape()), look.get_dtype()
    return looks


def _opened(file: str, field: str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        name = os.path.basename(file)
        raise InvalidArgument(f"{name}: {error}"[:300], field=field, reason="WEIGHTS_INVALID") from None


def _refuse(field: str, words: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise InvalidArgument(
            f"the folder {words} {', '.join(names[:_MOST_NAMED])}{more}", field=field, reason="WEIGHTS_MISMATCH"
        )
