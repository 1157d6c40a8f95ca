"""A module's parameters and buffers, as the contract lists them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from gradwire.user_values import dtype_name
from gradwire_proto.errors import ExportError
from gradwire_proto.values import ITEM_SIZE, StateTensor


@dataclass(frozen=True, kw_only=True)
class ModuleState:
    """`tensors`: in the order of state_dict, tied ones as aliases. `by_name`: the live tensors, under every name."""

    tensors: tuple[StateTensor, ...]
    by_name: dict[str, Tensor]

    @property
    def values(self) -> dict[str, Tensor]:
        """The live tensors without aliases, detached, not copied."""
        return {each.name: self.by_name[each.name].detach() for each in self.tensors if each.alias_of is None}

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The live parameters that require gradients, without aliases."""
        return {each.name: self.by_name[each.name] for each in self.tensors if each.requires_grad and not each.alias_of}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The live parameters that require no gradients, and could: without aliases."""
        return {
            each.name: self.by_name[each.name]
            for each in self.tensors
            if each.role == "parameter"
            and not (each.requires_grad or each.alias_of)
            and (self.by_name[each.name].is_floating_point() or self.by_name[each.name].is_complex())
        }


@contextmanager
def thawed(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these frozen parameters require gradients."""
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)


def describe_state(module: nn.Module) -> ModuleState:
    """List a module's parameters and buffers. Raises ExportError for one that the service cannot hold."""
    by_name: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    tensors = []
    for name, tensor, role in _walk(module, ""):
        if dtype_name(tensor.dtype) not in ITEM_SIZE or tensor.is_sparse or tensor.is_quantized or tensor.is_meta:
            kind = "on the meta device, without values" if tensor.is_meta else f"of {tensor.dtype}, {tensor.layout}"
            raise ExportError(f"tensor {name!r} is {kind}", field=name, reason="DTYPE_UNSUPPORTED")
        if tensor.is_inference():
            raise ExportError(
                f"tensor {name!r} was made inside torch.inference_mode(), and can never be trained: build the module"
                " outside, or copy it with copy.deepcopy outside",
                field=name,
                reason="EXPORT_INFERENCE_TENSOR",
            )
        by_name[name] = tensor
        alias_of = first_name.get(id(tensor))
        first_name.setdefault(id(tensor), name)
        tensors.append(
            StateTensor(
                name=name,
                role=role,
                dtype=dtype_name(tensor.dtype),
                shape=tuple(tensor.shape),
                requires_grad=tensor.requires_grad and role == "parameter",
                alias_of=alias_of,
            )
        )
    state = ModuleState(tensors=tuple(tensors), by_name=by_name)
    _refuse_overlaps(state)
    return state


def buffer_values(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the values of every buffer that the module has now, by name."""
    return {name: tensor.detach().clone() for name, tensor, role in _walk(module, "") if role != "parameter"}


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, role) in the order of state_dict, a shared module's under each of its names."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield prefix + name, parameter, "parameter"
    for name, buffer in module._buffers.items():
        if buffer is not None:
            temporary = name in module._non_persistent_buffers_set
            yield prefix + name, buffer, "temporary_buffer" if temporary else "buffer"
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def _refuse_overlaps(state: ModuleState) -> None:
    """Different tensors over the same memory would come apart on the service when one of them changes."""
    spans = []
    for name in state.values:
        tensor = state.by_name[name]
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size(), name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end and any(state.by_name[each].requires_grad for each in (name, other)):
            raise ExportError(
                f"{name!r} and {other!r} are different tensors over the same memory, which cannot be kept on the"
                " service: register one parameter under both names",
                field=other,
                reason="EXPORT_SHARED_MEMORY",
            )
