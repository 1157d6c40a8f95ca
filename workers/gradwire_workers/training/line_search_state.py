"""The state of LBFGS, which is one for all parameters, flat, and kept with the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument

_COUNTERS = ("func_evals", "n_iter")
_HISTORY = ("old_dirs", "old_stps", "ro")
_AFTER_A_STEP = (*_COUNTERS, "d", "t", *_HISTORY, "H_diag", "prev_flat_grad", "prev_loss")


def check_line_search_state(
    given: Mapping[str, Any], parameters: Sequence[tuple[str, nn.Parameter]], history_size: int
) -> dict[str, dict[str, Any]]:
    """The state by the first parameter's name, if it fits; InvalidArgument OPTIMIZER_STATE_MISMATCH at its path."""
    if not given:
        return {}
    first = parameters[0][0]
    if set(given) != {first}:
        raise _refusal("state.state", f"LBFGS's one state, with the first parameter, {first!r}")
    field, state = f'state.state["{first}"]', given[first]
    if not isinstance(state, Mapping) or not set(_COUNTERS) <= set(state):
        raise _refusal(field, f"a dict of {', '.join(_COUNTERS)} and more")
    for name in _COUNTERS:
        if not isinstance(state[name], int) or isinstance(state[name], bool) or state[name] < 0:
            raise _refusal(f"{field}.{name}", "an int of at least 0")
    expected = set(_AFTER_A_STEP if state["n_iter"] else _COUNTERS)
    if set(state) - {"al"} != expected:
        raise _refusal(field, f"a dict of {', '.join(sorted(expected))}")
    if state["n_iter"]:
        _check_step(state, [each for _, each in parameters], history_size, field)
    return {first: dict(state)}


def _check_step(state: Mapping[str, Any], parameters: Sequence[nn.Parameter], history_size: int, field: str) -> None:
    flats = [torch.view_as_real(each) if each.is_complex() else each for each in parameters]
    size = sum(each.numel() for each in flats)
    dtype = torch.cat([each.detach().new_empty(0) for each in flats]).dtype

    def flat(value: Any) -> bool:
        return isinstance(value, Tensor) and tuple(value.shape) == (size,) and value.dtype is dtype

    def check(name: str, right: Callable[[Any], bool], words: str) -> None:
        if not right(state[name]):
            raise _refusal(f"{field}.{name}", words)

    vector = f"{str(dtype).removeprefix('torch.')}[{size}]"
    for name in ("d", "prev_flat_grad"):
        check(name, flat, vector)
    for name in ("t", "H_diag", "prev_loss"):
        check(name, _is_scalar, "a number")
    for name in _HISTORY:
        check(
            name, lambda value: isinstance(value, list) and len(value) <= history_size, "a list of at most history_size"
        )
    for name in ("old_dirs", "old_stps"):
        check(name, lambda value: all(map(flat, value)), f"a list of {vector}")
    check("ro", lambda value: all(map(_is_scalar, value)), "a list of numbers")
    if len({len(state[name]) for name in _HISTORY}) != 1:
        raise _refusal(f"{field}.ro", "as many as there are old_dirs and old_stps")
    if "al" in state:
        words = f"a list of {history_size} numbers or Nones"
        check("al", lambda value: isinstance(value, list) and len(value) == history_size, words)
        check("al", lambda value: all(each is None or _is_scalar(each) for each in value), words)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refusal(field: str, expected: str) -> InvalidArgument:
    return InvalidArgument(f"expected {expected}", field=field, reason="OPTIMIZER_STATE_MISMATCH")
