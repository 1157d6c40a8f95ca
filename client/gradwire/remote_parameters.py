"""A model's parameters and buffers as a module of the client has them: right in all but memory, fetched when read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gradwire.errors import FailedPrecondition
from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import StateTensor

_METADATA = frozenset(
    {"shape", "dtype", "device", "layout", "is_leaf", "grad_fn", "ndim", "is_sparse", "is_cuda", "is_quantized"}
    | {"is_meta", "requires_grad", "names", "itemsize", "nbytes", "is_mkldnn", "_version", "retains_grad", "is_cpu"}
    | {"is_mps", "is_xpu", "is_nested", "output_nr", "_backward_hooks", "_post_accumulate_grad_hooks", "_base"}
)
"""Attributes that say nothing of a tensor's values."""

_QUESTIONS = frozenset(
    {"size", "dim", "numel", "stride", "nelement", "element_size", "is_floating_point", "is_complex", "storage_offset"}
    | {"ndimension", "is_contiguous", "__len__", "requires_grad_", "is_inference", "is_signed", "get_device"}
    | {"is_tensor", "__hash__", "_is_view", "is_pinned", "is_shared"}
)
"""Functions that say nothing of them either."""


class RemoteTensor:
    """What parameters and buffers have in common. `fetch` fills the values of all that are not as the service has them.

    Reading one in any operation brings its values. Changing one in place is refused: `load_state_dict` does that.
    """

    remote_name: str
    fetch: Callable[[], None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name in _QUESTIONS or (name in ("__get__", "__set__") and owner in (_METADATA | {"requires_grad"})):
                return func(*args, **(kwargs or {}))
            if name in ("register_hook", "register_post_accumulate_grad_hook"):
                raise _refusal(
                    "hooks of parameters do not run: their gradients stay on the service", "HOOK_UNSUPPORTED"
                )
            found = [each for each in _flat(args, kwargs) if isinstance(each, RemoteTensor)]
            for each in found:
                each.fetch()
            if owner == "data":
                if name == "__set__":
                    raise _change_refused()
                return torch.Tensor._make_subclass(RemoteData, func(*args).clone(), False)
            return _unchanging(found, func, args, kwargs)


class RemoteData(torch.Tensor):
    """What `.data` of a placeholder gives: a copy that refuses to be changed in place, as the placeholder does."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = [each for each in _flat(args, kwargs) if isinstance(each, RemoteData)]
            return _unchanging(found, func, args, kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.clone()


def _unchanging(found: list[Any], func: Any, args: Any, kwargs: Any) -> Any:
    """What `func` gives. Raises FailedPrecondition where it has changed one of the tensors."""
    before = [each._version for each in found]
    result = func(*args, **(kwargs or {}))
    if any(each._version != old for each, old in zip(found, before, strict=True)):
        raise _change_refused()
    return result


def _change_refused() -> FailedPrecondition:
    message = "the tensor lives on the service, where this change would not arrive: use load_state_dict"
    return _refusal(message, "PARAMETER_REMOTE")


def _flat(args: Any, kwargs: Any) -> list[Any]:
    found: list[Any] = []
    waiting = [*args, *(kwargs or {}).values()]
    while waiting:
        each = waiting.pop()
        if isinstance(each, (list, tuple)):
            waiting.extend(each)
        else:
            found.append(each)
    return found


class RemoteParameter(RemoteTensor, nn.Parameter):
    """A parameter on the service. `.grad` is fetched when it is read; what is done to it there, `step` applies."""

    gradients: Any

    @property
    def grad(self) -> torch.Tensor | None:  # pyright: ignore
        return self.gradients.get(self)

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:  # pyright: ignore
        self.gradients.set(self, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise _refusal("it lives on the service: copy state_dict() instead", "PARAMETER_REMOTE")

    def __deepcopy__(self, memo: Any) -> Any:
        self.__reduce_ex__(4)


class RemoteBuffer(RemoteTensor, torch.Tensor):
    """A buffer on the service."""

    __reduce_ex__ = RemoteParameter.__reduce_ex__  # pyright: ignore[reportAssignmentType]
    __deepcopy__ = RemoteParameter.__deepcopy__


def make_tensor(spec: StateTensor, fetch: Callable[[], None], gradients: Any) -> Any:
    """The placeholder of one of the model's tensors. Its memory is touched only when it is filled."""
    memory = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
    if spec.role == "parameter":
        made: Any = torch.Tensor._make_subclass(RemoteParameter, memory, spec.requires_grad)
        made.gradients = gradients
    else:
        made = torch.Tensor._make_subclass(RemoteBuffer, memory, False)
    made.remote_name, made.fetch = spec.name, fetch
    return made


def _refusal(message: str, reason: str) -> FailedPrecondition:
    return FailedPrecondition(message, reason=reason)
