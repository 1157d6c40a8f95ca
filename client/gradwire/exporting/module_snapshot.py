"""What modules hold besides parameters, to be put back: attributes, containers in them, buffers, plain tensors."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.exporting.random_state import cuda_devices, random_state_kept

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)
_NUMBERS = (bool, int, float)


class Snapshot:
    """The state of modules, as it is now. Parameters are left out: nothing but a forward that writes them changes them.

    names: what the modules are called in messages, "" for the one that needs no name.
    """

    def __init__(self, **modules: nn.Module | None) -> None:
        self._attributes: list[tuple[str, nn.Module, dict[str, Any]]] = []
        self._containers: dict[int, tuple[str, Any, Any]] = {}
        tensors: dict[int, Tensor] = {}
        for top, module in modules.items():
            for name, each in module.named_modules() if module is not None else ():
                path = ".".join(part for part in ("" if top == "module" else top, name) if part)
                self._attributes.append((path, each, dict(each.__dict__)))
                for attribute, value in each.__dict__.items():
                    self._collect(f"{path}.{attribute}" if path else attribute, value, tensors, {})
        self._tensors = [Kept(tensor) for tensor in tensors.values()]
        self._buffers = {id(buffer) for _, each, _ in self._attributes for buffer in each._buffers.values()}
        self.devices = cuda_devices(
            tensor
            for _, each, _ in self._attributes
            for tensor in (*each._parameters.values(), *each._buffers.values())
        )

    def _collect(self, path: str, value: Any, tensors: dict[int, Tensor], seen: dict[int, Any]) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                tensors[id(value)] = value
        elif type(value) in (*_CONTAINERS, tuple) and id(value) not in seen and id(value) not in self._containers:
            seen[id(value)] = value
            if type(value) is not tuple:
                self._containers[id(value)] = (path, value, copy.copy(value))
            for item in value.values() if isinstance(value, dict) else value:
                self._collect(path, item, tensors, seen)

    def restore(self) -> None:
        """Put everything back."""
        for _, each, attributes in self._attributes:
            each.__dict__.update(attributes)
            for name in each.__dict__.keys() - attributes.keys():
                del each.__dict__[name]
        for _, container, content in self._containers.values():
            if not _same_items(container, content):
                _refill(container, content)
        for kept in self._tensors:
            kept.restore()

    def restore_buffers(self) -> None:
        """Put the buffers back, which the service keeps, and leave the rest: what a forward left behind in Python."""
        for _, each, attributes in self._attributes:
            before = self._containers[id(attributes["_buffers"])][2]
            each._buffers.update({name: buffer for name, buffer in before.items() if buffer is not None})
        for kept in self._tensors:
            if id(kept.tensor) in self._buffers:
                kept.restore()

    def changed(self) -> set[str]:
        """The attributes that are other than they were, as "layer.attribute". A buffer for a buffer is no change."""
        found = set()
        for path, each, attributes in self._attributes:
            now = each.__dict__
            found |= {
                f"{path}.{name}" if path else name
                for name in now.keys() | attributes.keys()
                if name not in now or name not in attributes or not _same_object(now[name], attributes[name])
            }
        for path, container, content in self._containers.values():
            if not _same_items(container, content) and not _buffers_alone(path, container, content):
                found.add(path)
        return found

    def numbers(self) -> dict[str, list[tuple[Any, Any]]]:
        """Where numbers lie: by attribute, (holder, key) of each. holder[key] is the number, or what is there now."""
        found: dict[str, list[tuple[Any, Any]]] = {}
        for path, each, attributes in self._attributes:
            for name, value in attributes.items():
                if type(value) in _NUMBERS:
                    found.setdefault(f"{path}.{name}" if path else name, []).append((each.__dict__, name))
        for path, container, content in self._containers.values():
            if isinstance(container, (MutableMapping, MutableSequence)):
                items = content.items() if isinstance(content, dict) else enumerate(content)
                places = [(container, key) for key, value in items if type(value) in _NUMBERS]
                if places:
                    found.setdefault(path, []).extend(places)
        return found


class Kept:
    """A tensor with its values as they are now."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._value = tensor.detach().clone()
        self._differentiable = tensor.requires_grad
        self._version = None if tensor.is_inference() else tensor._version
        self._comparable = tensor.layout is torch.strided and not (tensor.is_meta or tensor.is_quantized)

    def restore(self) -> None:
        """Give the tensor its values back, and take away the history that it was given since."""
        tensor = self.tensor
        # Where the module changes a buffer by something that needs gradients.
        if tensor.requires_grad and not self._differentiable and not tensor._is_view():
            tensor.detach_()
        # Versions do not tell of writes through `.data`.
        if not torch.equal(tensor, self._value) if self._comparable else tensor._version != self._version:
            with torch.no_grad():
                tensor.copy_(self._value)


@contextmanager
def preserved(module: nn.Module, loss: nn.Module | None = None) -> Iterator[None]:
    """Inside, the modules may be run and exported; after, they are as before, and so are the random numbers."""
    snapshot = Snapshot(module=module, loss=loss)
    with random_state_kept(snapshot.devices):
        try:
            yield
        finally:
            snapshot.restore()


@contextmanager
def rewound(tensors: Iterable[Tensor]) -> Iterator[None]:
    """After, the tensors have their values back."""
    kept = [Kept(tensor) for tensor in {id(tensor): tensor for tensor in tensors}.values()]
    try:
        yield
    finally:
        for each in kept:
            each.restore()


def _same_object(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, (*_NUMBERS, str)) and one == other)


def _same_items(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(content, set):
        return container == content
    if isinstance(content, dict):
        return all(key in container and _same_object(container[key], value) for key, value in content.items())
    return all(_same_object(one, other) for one, other in zip(container, content, strict=True))


def _buffers_alone(path: str, container: Any, content: Any) -> bool:
    """Whether a change is one of buffers from tensor to tensor, which the graph carries."""
    return path.rpartition(".")[2] == "_buffers" and all(
        container.get(name) is buffer or (isinstance(container.get(name), Tensor) and isinstance(buffer, Tensor))
        for name, buffer in (*content.items(), *((name, None) for name in container.keys() - content.keys()))
    )


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
