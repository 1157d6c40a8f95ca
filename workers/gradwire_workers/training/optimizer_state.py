"""An optimizer's state by parameter names: read, and put back where it fits, all of it or nothing.

    {"optimizer": "Adam",
     "state": {"0.weight": {"step": tensor, "exp_avg": tensor, ...}, ...},
     "param_groups": [{"params": ["0.weight", ...], "lr": 0.001, ...}],
     "schedule": {"name": "StepLR", "state": {"last_epoch": 3, ...}, "schedulers": []},
     "scaler": {"scale": 65536.0, ...}}    where losses are scaled

The options are those of the group as they are now. torch's own load_state_dict is not used: it converts what an
optimizer keeps in another type than its parameter's, and then a run that goes on differs from one that never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.optimizers import OptimizerKind
from gradwire_workers.training.first_step import TensorLike, first_states
from gradwire_workers.training.line_search_state import check_line_search_state
from gradwire_workers.training.loss_scale import LossScale
from gradwire_workers.training.option_check import Number, check_options
from gradwire_workers.training.schedule import Schedule

_FIELDS = ("optimizer", "state", "param_groups", "schedule")


class OptimizerState:
    """See the module. `parameters`: what the optimizer updates, by name."""

    def __init__(
        self,
        kind: OptimizerKind,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule | None,
        parameters: Mapping[str, nn.Parameter],
        loss_scale: LossScale | None = None,
    ) -> None:
        self._kind = kind
        self._optimizer = optimizer
        self._schedule = schedule
        self._loss_scale = loss_scale
        self._parameters = parameters
        self._names = {parameter: name for name, parameter in parameters.items()}
        # Some optimizers make their state when they are made, and do without never.
        self._needs_all = bool(optimizer.state)

    def read(self) -> dict[str, Any]:
        """The state. Tensors are live."""
        state = self._optimizer.state
        return {
            "optimizer": self._kind.name,
            "state": {name: dict(state[each]) for name, each in self._parameters.items() if state.get(each)},
            "param_groups": [
                {**group, "params": [self._names[each] for each in group["params"]]}
                for group in self._optimizer.param_groups
            ],
            "schedule": None if self._schedule is None else self._schedule.state(),
            **({} if self._loss_scale is None else {"scaler": self._loss_scale.state()}),
        }

    def load(self, given: Any) -> None:
        """Replace the state. A parameter that is left out begins anew, where torch's optimizers can.

        Raises InvalidArgument OPTIMIZER_STATE_MISMATCH, and those of options, at the path of what does not fit.
        """
        scale = self._loss_scale
        _check_keys(given, _FIELDS if scale is None else (*_FIELDS, "scaler"), "state")
        if given["optimizer"] != self._kind.name:
            raise _refusal("state.optimizer", f"{self._kind.name!r}, as the model has", given["optimizer"])
        options = self._checked_groups(given["param_groups"])
        state = self._checked_state(given["state"], options)
        counters = self._checked_schedule(given["schedule"])
        scaler = None if scale is None else scale.checked(given["scaler"], "state.scaler")
        # From here on nothing can fail but for want of memory, and that only before anything is replaced.
        copies: dict[Tensor, Any] = {self._parameters[name]: _copied(kept) for name, kept in state.items()}
        self._optimizer.state.clear()
        self._optimizer.state.update(copies)
        for group, new in zip(self._optimizer.param_groups, options, strict=True):
            group.update(new)
        for scheduler, values in counters:
            scheduler.__dict__.update(values)
        if scale is not None and scaler is not None:
            scale.take(scaler)

    def restore(self, given: Mapping[str, Any]) -> None:
        """Go on from what `read` gave, bit for bit; an optimizer that was just made, and is thrown away after an error.

        Values are not judged: schedules bring options to what no client may ask for.
        Raises InvalidArgument OPTIMIZER_STATE_MISMATCH where the state is that of another optimizer.
        """
        groups = self._optimizer.param_groups
        mine = [[self._names[each] for each in group["params"]] for group in groups]
        theirs = [list(group["params"]) for group in given["param_groups"]]
        if (given["optimizer"], theirs) != (self._kind.name, mine):
            raise _refusal("state", f"that of {self._kind.name} of the model's parameters")
        for name, kept in given["state"].items():
            parameter = self._parameters[name]
            devices = self._devices(parameter)
            self._optimizer.state[parameter] = {
                key: _placed(value, parameter, devices.get(key)) for key, value in kept.items()
            }
        for scheduler, values in self._checked_schedule(given["schedule"]):
            scheduler.__dict__.update(values)
        for group, new in zip(groups, given["param_groups"], strict=True):
            group.update({name: _as_option(value) for name, value in new.items() if name != "params"})
        if self._loss_scale is not None:
            self._loss_scale.take(given["scaler"])

    def _devices(self, parameter: nn.Parameter) -> dict[str, torch.device]:
        """Where torch keeps what it keeps of a parameter. On the CPU there is one place."""
        if parameter.device.type == "cpu":
            return {}
        group = next(each for each in self._optimizer.param_groups if any(one is parameter for one in each["params"]))
        (like,) = self._first_states([parameter], group, "state")
        return {name: value.device for name, value in like.items() if isinstance(value, TensorLike)}

    # --- groups ---------------------------------------------------------------------------------------------------

    def _checked_groups(self, given: Any) -> list[dict[str, Any]]:
        groups = self._optimizer.param_groups
        if not isinstance(given, (list, tuple)) or len(given) != len(groups):
            raise _refusal("state.param_groups", f"a list of {len(groups)} groups")
        return [
            self._checked_options(new, group, f"state.param_groups[{index}]")
            for index, (new, group) in enumerate(zip(given, groups, strict=True))
        ]

    def _checked_options(self, given: Any, group: Mapping[str, Any], field: str) -> dict[str, Any]:
        _check_keys(given, tuple(group), field)
        names = [self._names[each] for each in group["params"]]
        params = given["params"]
        if not isinstance(params, (list, tuple)) or len(params) != len(names) or set(map(str, params)) != set(names):
            raise _refusal(f"{field}.params", f"{len(names)} names, {', '.join(map(repr, names[:3]))} among them")
        options = {name: value for name, value in given.items() if name != "params"}
        known = {name: value for name, value in options.items() if name in self._kind.options}
        check_options(known, self._kind.options, field=field, owner=f"torch.optim.{self._kind.name}")
        for name in options.keys() - known.keys():
            # What a schedule keeps beside the options, such as initial_lr; the rest never changes.
            if isinstance(group[name], float) and Number()(options[name]) is not None:
                raise _refusal(f"{field}.{name}", "a finite number", options[name])
            kept = group[name]
            if not isinstance(kept, float) and (type(options[name]) is not type(kept) or options[name] != kept):
                raise _refusal(f"{field}.{name}", repr(group[name]), options[name])
        return {name: _as_option(value) for name, value in options.items()}

    # --- state ----------------------------------------------------------------------------------------------------

    def _checked_state(self, given: Any, options: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        if not isinstance(given, Mapping):
            raise _refusal("state.state", "a dict of parameter names")
        for name in given:
            if name not in self._parameters:
                raise InvalidArgument(
                    "the optimizer has no such parameter", field=f'state.state["{name}"]'[:300], reason="NO_MATCH"
                )
        missing = [name for name in self._parameters if name not in given]
        if self._needs_all and missing:
            raise _refusal("state.state", f"the state of every parameter; {missing[0]!r} is missing")
        if isinstance(self._optimizer, torch.optim.LBFGS):
            return check_line_search_state(given, list(self._parameters.items()), options[0]["history_size"])
        checked: dict[str, dict[str, Any]] = {}
        for index, (group, new) in enumerate(zip(self._optimizer.param_groups, options, strict=True)):
            likes = self._first_states(group["params"], new, f"state.param_groups[{index}]")
            for parameter, like in zip(group["params"], likes, strict=True):
                name = self._names[parameter]
                if name in given:
                    checked[name] = self._checked_entry(given[name], like, f'state.state["{name}"]')
        return checked

    def _first_states(self, parameters: list[nn.Parameter], options: dict[str, Any], field: str) -> list[Any]:
        own = {name: value for name, value in options.items() if name in self._kind.options}
        if "momentum" in own:
            # A schedule may have brought it to 0 for now.
            own["momentum"] = max(own["momentum"], options.get("max_momentum", 0.0))
        owner = f"torch.optim.{self._kind.name}"
        return first_states(self._kind.make, own, parameters, owner=owner, field=field)

    def _checked_entry(self, given: Any, like: Mapping[str, Any], field: str) -> dict[str, Any]:
        # Torch's SGD makes its momentum when it is first asked for any.
        needed = () if isinstance(self._optimizer, torch.optim.SGD) else tuple(like)
        if not isinstance(given, Mapping) or not set(needed) <= set(given) <= set(like):
            raise _refusal(field, f"a dict of {', '.join(like) or 'nothing'}")
        return {name: _checked_value(value, like[name], f"{field}.{name}") for name, value in given.items()}

    def _checked_schedule(self, given: Any) -> list[tuple[Any, dict[str, Any]]]:
        if self._schedule is None:
            if given is not None:
                raise _refusal("state.schedule", "none: the model has no schedule")
            return []
        return self._schedule.load(given, field="state.schedule")


def _checked_value(given: Any, like: Any, field: str) -> Any:
    if not isinstance(like, TensorLike):
        if type(given) is not type(like):
            raise _refusal(field, f"a value like {like!r}", given)
        return given
    if not isinstance(given, Tensor):
        raise _refusal(field, "a tensor", given)
    if tuple(given.shape) != like.shape or given.dtype is not like.dtype:
        raise _refusal(field, _described(like.dtype, like.shape), _described(given.dtype, given.shape))
    # A counter below 0 would have torch divide by zero, halfway through an update.
    if field.endswith(".step") and not bool((given >= 0).all()):
        raise _refusal(field, "0 or more", given.item())
    return given.to(like.device)


def _placed(value: Any, parameter: nn.Parameter, device: torch.device | None) -> Any:
    """A copy of a kept value, its tensors laid out as the parameter where they are like it."""
    if isinstance(value, Tensor):
        target = parameter.device if device is None else device
        like = parameter.detach() if value.shape == parameter.shape else value
        return torch.empty_like(like, dtype=value.dtype, device=target).copy_(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_placed(item, parameter, device) for item in value)
    return value


def _as_option(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def _check_keys(given: Any, expected: tuple[str, ...], field: str) -> None:
    if isinstance(given, Mapping) and set(given) == set(expected):
        return
    listed = "" if not isinstance(given, Mapping) else f", got {', '.join(map(str, given))}"[:200]
    raise InvalidArgument(
        f"expected a dict of {', '.join(expected)}{listed}", field=field, reason="OPTIMIZER_STATE_MISMATCH"
    )


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return str(dtype).removeprefix("torch.") + str(list(shape))


def _refusal(field: str, expected: str, given: Any = None) -> InvalidArgument:
    got = "" if given is None else f", got {given if isinstance(given, str) else repr(given)}"[:200]
    return InvalidArgument(f"expected {expected}{got}", field=field, reason="OPTIMIZER_STATE_MISMATCH")
