"""A torch scheduler as part of an update that happens wholly or not at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from gradwire_proto.errors import FailedPrecondition, InvalidArgument

_COUNTERS = (
    "last_epoch",
    "_step_count",
    "base_lrs",
    "_last_lr",
    "T_cur",
    "T_i",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
)
"""What changes while a scheduler runs, or follows from where it began. All else is its arguments."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The schedulers' attributes, and the options of the optimizer's groups, at some time."""

    attributes: list[dict[str, Any]]
    options: list[dict[str, Any]]


class Schedule:
    """The learning rates of an optimizer's updates: `plan` the next before an update, `take` the plan after it."""

    def __init__(self, scheduler: LRScheduler, optimizer: torch.optim.Optimizer) -> None:
        self._root = scheduler
        self._all = list(_with_parts(scheduler))
        self._optimizer = optimizer

    @property
    def needs_loss(self) -> bool:
        """Whether the next learning rate depends on the loss."""
        return isinstance(self._root, ReduceLROnPlateau)

    def plan(self, loss: float | None) -> Moment:
        """What follows after an update with this loss. Changes nothing.

        Raises FailedPrecondition SCHEDULE_FAILED where torch's scheduler has no further step, on every rank alike.
        """
        now = self._now()
        try:
            with warnings.catch_warnings():
                # Torch means its steps to come after the update, and its own SequentialLR does what it advises against.
                warnings.simplefilter("ignore", UserWarning)
                if isinstance(self._root, ReduceLROnPlateau):
                    self._root.step(math.nan if loss is None else loss)
                else:
                    self._root.step()
            return self._now()
        except (ValueError, ArithmeticError, TypeError, NotImplementedError) as error:
            raise FailedPrecondition(
                f"the schedule {type(self._root).__name__} cannot go on: {error}", reason="SCHEDULE_FAILED"
            ) from error
        finally:
            self.take(now)

    def take(self, moment: Moment) -> None:
        """Go on from there."""
        for scheduler, attributes in zip(self._all, moment.attributes, strict=True):
            scheduler.__dict__.update(attributes)
        for group, options in zip(self._optimizer.param_groups, moment.options, strict=True):
            group.update(options)

    def _now(self) -> Moment:
        groups = self._optimizer.param_groups
        return Moment(
            [dict(scheduler.__dict__) for scheduler in self._all],
            [{name: value for name, value in group.items() if name != "params"} for group in groups],
        )

    # --- state ----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The class `name`, the counters `state`, and the same of the `schedulers` that it is made of."""
        return _state(self._root)

    def load(self, state: Any, *, field: str) -> list[tuple[Any, dict[str, Any]]]:
        """Check a state: (scheduler, its new counters) for each. Its arguments stay this schedule's own."""
        return list(_checked(self._root, state, field))


def _with_parts(scheduler: Any) -> Iterator[Any]:
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from _with_parts(part)


def _counters(scheduler: Any) -> dict[str, Any]:
    return {name: scheduler.__dict__[name] for name in _COUNTERS if name in scheduler.__dict__}


def _state(scheduler: Any) -> dict[str, Any]:
    return {
        "name": type(scheduler).__name__,
        "state": _counters(scheduler),
        "schedulers": [_state(part) for part in getattr(scheduler, "_schedulers", ())],
    }


def _checked(scheduler: Any, state: Any, field: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    parts = list(getattr(scheduler, "_schedulers", ()))
    if not isinstance(state, Mapping) or set(state) != {"name", "state", "schedulers"}:
        raise _refusal(field, "a dict of name, state and schedulers")
    if state["name"] != type(scheduler).__name__:
        raise _refusal(f"{field}.name", f"{type(scheduler).__name__!r}, as the model has", state["name"])
    expected, given = _counters(scheduler), state["state"]
    if not isinstance(given, Mapping) or set(given) != set(expected):
        raise _refusal(f"{field}.state", f"a dict of {', '.join(expected)}")
    for name, value in expected.items():
        words = _misfit(given[name], value)
        if words is not None:
            raise _refusal(f"{field}.state.{name}", words, given[name])
    if not isinstance(state["schedulers"], (list, tuple)) or len(state["schedulers"]) != len(parts):
        raise _refusal(f"{field}.schedulers", f"a list of {len(parts)}")
    yield scheduler, {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    for index, (part, of_part) in enumerate(zip(parts, state["schedulers"], strict=True)):
        yield from _checked(part, of_part, f"{field}.schedulers[{index}]")


def _misfit(given: Any, now: Any) -> str | None:
    """What a counter must be, in words, if it is not."""
    if isinstance(now, list):
        right = isinstance(given, (list, tuple)) and len(given) == len(now) and all(map(_is_number, given))
        return None if right else f"a list of {len(now)} numbers"
    if isinstance(now, int):
        return None if isinstance(given, int) and not isinstance(given, bool) and given >= -1 else "an int from -1"
    return None if _is_number(given) else "a number"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refusal(field: str, expected: str, given: Any = None) -> InvalidArgument:
    got = "" if given is None else f", got {given!r}"[:200]
    return InvalidArgument(f"expected {expected}{got}", field=field, reason="OPTIMIZER_STATE_MISMATCH")
