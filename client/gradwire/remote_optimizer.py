"""A model's optimizer on the service as a torch.optim.Optimizer of the client."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from gradwire.autograd_calls import AutogradCalls
from gradwire.calls import ModelCalls
from gradwire.deadline import Deadline
from gradwire.errors import FailedPrecondition, InvalidArgument
from gradwire.remote_module import RemoteModule
from gradwire.remote_parameters import RemoteParameter
from gradwire_proto.values import OptimizerSpec


class RemoteOptimizer(torch.optim.Optimizer):
    """The optimizer of a model: made by `Model.as_optimizer`.

    `param_groups` has the options as the service has them; those that are changed here, as torch.optim.lr_scheduler
    does, the next step takes. `state` stays empty: what the optimizer keeps is in `state_dict()`, by parameter name.
    """

    def __init__(
        self,
        module: RemoteModule,
        calls: ModelCalls,
        autograd: AutogradCalls,
        run: Callable[..., Any],
    ) -> None:
        _check_can_step(calls.optimizer)
        self._module, self._calls, self._autograd, self._call = module, calls, autograd, run
        self._seen = calls.settings_changes
        groups = self._call(calls.optimizer_state_dict())["param_groups"]
        self._known = [_options(group) for group in groups]
        super().__init__([{**group, "params": self._members(group)} for group in groups], dict(self._known[0]))

    def catch_up(self, deadline: Deadline, names: Collection[str] | None = ()) -> bool:
        """Take over what `Model.update` or a loaded state has changed on the service; False where it has other groups.

        An option that was changed here and not there stays as it is here, but for those of `names`; None: all.
        deadline: that of the call of which this is a part.
        """
        seen = self._calls.settings_changes
        if seen == self._seen:
            return True
        groups = self._call(self._calls.optimizer_state_dict(), deadline)["param_groups"]
        if len(groups) != len(self._known):
            return False
        for group, known, there in zip(self.param_groups, self._known, groups, strict=True):
            for name in known.keys() - there.keys():
                group.pop(name, None)
            for name, value in _options(there).items():
                is_new = name not in known or _plain(known[name]) != _plain(value)
                if is_new or names is None or name in names:
                    group[name] = value
            group["params"] = self._members(there)
        self._known = [_options(group) for group in groups]
        self._seen = seen
        return True

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Apply the gradients that the service holds, as they were left here where they were read.

        closure: evaluates the loss again first. Returns its value.
        """
        deadline = self._calls.deadline()
        self._check_current(deadline)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._module.remote_gradients.push(deadline)
        changed = self._changed_options()
        try:
            self._call(self._autograd.optimizer_step(changed), deadline)
        except FailedPrecondition as error:
            if error.reason != "NO_GRADIENTS":  # As in torch, where no parameter has a gradient, nothing happens.
                raise
            return loss
        for known, new in zip(self._known, changed, strict=True):
            known.update(new)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of every parameter, here and on the service."""
        self._module.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What `Model.optimizer_state_dict` gives, with the options as they are here."""
        deadline = self._calls.deadline()
        self._check_current(deadline)
        state = self._call(self._calls.optimizer_state_dict(), deadline)
        for group, changed in zip(state["param_groups"], self._changed_options(), strict=True):
            group.update(changed)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Replace the optimizer's state and its options, as `Model.load_optimizer_state_dict` does."""
        deadline = self._calls.deadline()
        self._call(self._calls.load_optimizer_state_dict(state_dict, deadline))
        self.catch_up(deadline, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: groups are given with the optimizer to create_model."""
        if not hasattr(self, "param_groups") or len(self.param_groups) < len(self._known):
            super().add_param_group(param_group)
            return
        raise FailedPrecondition("give optimizers their groups when the model is created", reason="GROUPS_FIXED")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise FailedPrecondition("it lives on the service: keep state_dict() instead", reason="PARAMETER_REMOTE")

    def _members(self, group: Mapping[str, Any]) -> list[RemoteParameter]:
        return [self._module.each_parameter[name] for name in group["params"]]

    def _check_current(self, deadline: Deadline) -> None:
        _check_can_step(self._calls.optimizer)
        if not self.catch_up(deadline):
            message = (
                "the model's optimizer has other groups since its settings were changed: call as_optimizer() again"
            )
            raise FailedPrecondition(message, reason="GROUPS_CHANGED")

    def _changed_options(self) -> list[dict[str, Any]]:
        changed: list[dict[str, Any]] = []
        for index, (group, known) in enumerate(zip(self.param_groups, self._known, strict=True)):
            if missing := known.keys() - group.keys():
                raise InvalidArgument(
                    "an option is missing", field=f"groups[{index}]{sorted(missing)}", reason="MISSING"
                )
            now = {name: _plain(group[name]) for name in known}
            changed.append({name: value for name, value in now.items() if value != _plain(known[name])})
        return changed


def _check_can_step(spec: OptimizerSpec | None) -> None:
    if spec is None:
        message = "the model has no optimizer: give one to create_model"
        raise FailedPrecondition(message, reason="NO_OPTIMIZER")
    if spec.name == "LBFGS":
        message = "LBFGS evaluates the loss several times in a step: use train_step"
        raise FailedPrecondition(message, reason="OPTIMIZER_NEEDS_BATCH")
    if spec.schedule is not None:
        raise FailedPrecondition(
            "the service steps the model's schedule itself: create the model without one, and use"
            " torch.optim.lr_scheduler",
            reason="SCHEDULE_SETS_OPTIONS",
        )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, (tuple, list)) else value
