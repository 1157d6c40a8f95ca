"""A model on the service as an nn.Module of the client: called, trained and read as if it were local."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gradwire.autograd_calls import AutogradCalls
from gradwire.calls import ModelCalls
from gradwire.errors import FailedPrecondition, InvalidArgument
from gradwire.remote_autograd import attach
from gradwire.remote_gradients import RemoteGradients
from gradwire.remote_parameters import RemoteParameter, make_tensor
from gradwire.retained_releases import RetainedReleases


class _Part(nn.Module):
    """A submodule: it holds names, and computes nothing by itself."""

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """The whole module's does it."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return _refuse_conversion(self, fn)


class RemoteModule(nn.Module):
    """A model on the service as a module: made by `Model.as_module`.

    Its outputs are on the CPU, and lead the client's autograd back to inputs that require gradients and to the model's
    parameters, whose gradients stay on the service until `.grad` is read. Threads must not share it.
    """

    def __init__(self, calls: ModelCalls, autograd: AutogradCalls, run: Callable[..., Any]) -> None:
        super().__init__()
        self._calls, self._autograd, self._run = calls, autograd, run
        self._fetched_at: int | None = None
        self._fetching = threading.RLock()
        self.remote_gradients = RemoteGradients(autograd, run, lambda: calls.gradient_changes)
        """Its parameters' gradients, for its optimizer."""
        self._releases = RetainedReleases(autograd.releaser())
        made: dict[str, Any] = {}
        for spec in calls.tensors:
            if spec.role not in ("parameter", "buffer"):
                continue
            made[spec.name] = (
                made[spec.alias_of] if spec.alias_of else make_tensor(spec, self._fetch, self.remote_gradients)
            )
            self._place(spec.name, made[spec.name])
        self._made = made
        unique = {id(each): each for each in made.values() if isinstance(each, RemoteParameter)}
        self.each_parameter = {each.remote_name: each for each in unique.values()}
        """Its parameters, frozen ones included, each under the name that the service gives it."""
        self._trained = {name for name, each in self.each_parameter.items() if each.requires_grad}
        self.remote_gradients.take_parameters(self.each_parameter[name] for name in self._trained_in_order())
        calls.watchers.add(self)
        self.train()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs, in the mode that `train()` and `eval()` set."""
        inputs = _as_inputs(args, kwargs)
        self._check_modes()
        wanted = self._wanted() if torch.is_grad_enabled() else []
        if not torch.is_grad_enabled() or not (wanted or _requires_grad(inputs)):
            return self._run(self._calls.forward(inputs, self.training))
        trainable = self.remote_gradients.parameters
        names = None if len(wanted) == len(trainable) else tuple(each.remote_name for each in wanted)
        dropped = self._releases.take()
        try:
            call = self._autograd.forward(inputs, training=self.training, wrt=names, release=dropped)
            self._releases.watch()
            retained = self._run(call)
        except BaseException:
            # Whether the service heard of them or not: names of none are passed over.
            for name in dropped:
                self._releases.drop(name)
            raise
        return attach(retained, wanted, self._backward, self._releases.drop)

    def take_settings(self) -> None:
        """Have the parameters require gradients that the service trains from now on, and no others."""
        trained = {spec.name for spec in self._calls.tensors if spec.role == "parameter" and spec.requires_grad}
        trained &= self.each_parameter.keys()
        for name in trained ^ self._trained:
            self.each_parameter[name].requires_grad_(name in trained)
        if trained != self._trained:
            self._trained = trained
            self.remote_gradients.take_parameters(self.each_parameter[name] for name in self._trained_in_order())

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Parameters and persistent buffers by name, pulled, with memory of their own."""
        if args:
            destination = args[0]
        destination = {} if destination is None else destination
        for name, tensor in self._run(self._calls.state_dict()).items():
            destination[prefix + name] = tensor
        return destination

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of every parameter, here and on the service."""
        if not set_to_none:
            message = "gradients on the service are dropped, not filled with zeros"
            raise InvalidArgument(message, field="set_to_none", reason="OPTION_UNSUPPORTED")
        self.remote_gradients.drop_local()
        self.remote_gradients.forget()
        self._run(self._calls.zero_grad())

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {key[len(prefix) :]: each for key, each in state_dict.items() if key.startswith(prefix)}
        known = self._made
        missing_keys.extend(prefix + name for name in known if name not in given)
        unexpected_keys.extend(prefix + name for name in given if name not in known and strict)
        fitting = {}
        for name, value in given.items():
            if name in known and value.shape != known[name].shape:
                error_msgs.append(f"size mismatch for {prefix + name}: {value.shape}, expected {known[name].shape}")
            elif name in known:
                fitting[name] = value
        if fitting:
            self._run(self._calls.load_state_dict(fitting, partial=True))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return _refuse_conversion(self, fn)

    def _place(self, name: str, tensor: Any) -> None:
        *path, last = name.split(".")
        owner: nn.Module = self
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, _Part())
            owner = owner._modules[part]  # pyright: ignore[reportAssignmentType]
        if isinstance(tensor, RemoteParameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor)

    def _wanted(self) -> list[RemoteParameter]:
        """The parameters that require gradients now."""
        wanted = [each for each in self.each_parameter.values() if each.requires_grad]
        for each in wanted:
            if each.remote_name not in self._trained:
                raise FailedPrecondition(
                    f"the parameter {each.remote_name!r} is frozen on the service: unfreeze it with"
                    " Model.update(trainable=)",
                    reason="PARAMETER_FROZEN",
                )
        return wanted

    def _trained_in_order(self) -> list[str]:
        return [name for name in self.each_parameter if name in self._trained]

    def _check_modes(self) -> None:
        other = next((name for name, each in self.named_modules() if each.training is not self.training), None)
        if other is not None:
            raise FailedPrecondition(
                f"the part {other!r} is in another mode than the whole module, which the service runs as one: call"
                " train() or eval() of the whole",
                reason="PARTS_IN_OTHER_MODE",
            )

    def _backward(self, query: Any, cotangents: Any) -> Any:
        deadline = self._calls.deadline()
        self.remote_gradients.push(deadline)
        return self._run(self._autograd.backward(query, cotangents, deadline), deadline)

    def _fetch(self) -> None:
        """Fill every placeholder, unless nothing was changed since it was filled."""
        with self._fetching:
            changes = self._calls.changes
            if self._fetched_at == changes:
                return
            values = self._run(self._calls.state_dict())
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                for name, tensor in self._made.items():
                    if name in values:
                        tensor.copy_(values[name])
            self._fetched_at = changes

    def __deepcopy__(self, memo: Any) -> Any:
        raise FailedPrecondition("it lives on the service: copy state_dict() instead", reason="PARAMETER_REMOTE")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__({})


def _as_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args and kwargs:
        message = "give all inputs by position, or all by name"
        raise InvalidArgument(message, field="inputs", reason="INPUTS_MIXED")
    if kwargs:
        return kwargs
    return args[0] if len(args) == 1 and not isinstance(args[0], (tuple, dict)) else args


def _requires_grad(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_requires_grad, value))
    if isinstance(value, dict):
        return any(map(_requires_grad, value.values()))
    return isinstance(value, torch.Tensor) and value.requires_grad


def _refuse_conversion(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`to`, `double`, `cuda` and their like: allowed where they change nothing."""
    for dtype in {each.dtype for each in (*module.parameters(), *module.buffers())}:
        probe = fn(torch.empty(0, dtype=dtype))
        if probe.dtype is not dtype or probe.device.type != "cpu":
            raise FailedPrecondition(
                f"the model stays on the service, in {dtype}: create it from a module of another type, or with device=",
                reason="PARAMETER_REMOTE",
            )
    return module
