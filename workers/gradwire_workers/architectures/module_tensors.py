"""A module's parameters and buffers, as the contract lists them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from gradwire_proto.values import StateTensor


def describe_tensors(module: nn.Module) -> tuple[tuple[StateTensor, ...], dict[str, Tensor]]:
    """(the tensors in the order of state_dict, tied ones as aliases; the live ones, under every name)."""
    by_name: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    specs = []
    for name, tensor, role in _walk(module, ""):
        by_name[name] = tensor
        alias_of = first.get(id(tensor))
        first.setdefault(id(tensor), name)
        specs.append(
            StateTensor(
                name=name,
                role=role,
                dtype=str(tensor.dtype).removeprefix("torch."),
                shape=tuple(tensor.shape),
                requires_grad=tensor.requires_grad and role == "parameter",
                may_train=isinstance(tensor, nn.Parameter) and (tensor.is_floating_point() or tensor.is_complex()),
                alias_of=alias_of,
            )
        )
    return tuple(specs), by_name


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, str]]:
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
