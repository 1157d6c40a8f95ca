"""The gradients of a model's parameters, as the client reads and changes them; the service holds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from gradwire.autograd_calls import AutogradCalls
from gradwire.deadline import Deadline
from gradwire.errors import InvalidArgument
from gradwire.remote_parameters import RemoteParameter

_slot: Any = torch.Tensor.grad
"""Where autograd itself puts what flows into a placeholder on the client, such as a penalty on the weights."""


class RemoteGradients:
    """See the module. `run(call, deadline)` makes a call; `changes()` counts what others have the service do to its
    gradients.

    All are fetched when one is read. What was changed here since, in place or not, is brought back before the service
    uses them: `push`; but what others change on the service in the meantime goes over it.
    """

    def __init__(
        self, calls: AutogradCalls, run: Callable[[Any, Deadline | None], Any], changes: Callable[[], int]
    ) -> None:
        self._calls = calls
        self._run = run
        self._changes = changes
        self._read_at = 0
        self.parameters: list[RemoteParameter] = []
        """The trained ones."""
        self._read: dict[str, torch.Tensor | None] | None = None
        self._as_read: dict[str, torch.Tensor | None] = {}

    def take_parameters(self, trained: Iterable[RemoteParameter]) -> None:
        """From now on these are trained. What was changed here of those that were before, and still are, stays."""
        before = self.parameters
        self.parameters = list(trained)
        for each in before:
            if not each.requires_grad:
                _slot.__set__(each, None)
        names = [each.remote_name for each in self.parameters]
        if self._read is not None:
            self._read = {name: self._read.get(name) for name in names}
            self._as_read = {name: self._as_read.get(name) for name in names}

    def get(self, parameter: RemoteParameter) -> torch.Tensor | None:
        """The parameter's gradient; None where it has none."""
        return self._fetched().get(parameter.remote_name)

    def set(self, parameter: RemoteParameter, value: torch.Tensor | None) -> None:
        """Put another gradient, or none, in place of the parameter's."""
        if value is not None and (value.shape, value.dtype) != (parameter.shape, parameter.dtype):
            message = f"expected {parameter.dtype}{list(parameter.shape)}, got {value.dtype}{list(value.shape)}"
            raise InvalidArgument(message, field=f'gradients["{parameter.remote_name}"]', reason="SHAPE_MISMATCH")
        self._fetched()[parameter.remote_name] = value

    def push(self, deadline: Deadline) -> None:
        """Bring to the service what was changed here, and forget what was read: the service goes on from there.

        deadline: that of the call that needs it there.
        """
        self._forget_old()
        if self._read is None and not any(_taken(each) is not None for each in self.parameters):
            return
        read = self._fetched(deadline)
        changed = {name: each for name, each in read.items() if not _same(each, self._as_read.get(name))}
        given = {name: each for name, each in changed.items() if each is not None}
        dropped = [name for name, each in changed.items() if each is None]
        if changed:
            self._run(self._calls.set_gradients(given, dropped, deadline), deadline)
        self.forget()

    def forget(self) -> None:
        """What was read is not what the service holds any more."""
        self._read, self._as_read = None, {}

    def drop_local(self) -> None:
        """Drop what autograd put into the placeholders here."""
        for each in self.parameters:
            _slot.__set__(each, None)

    def _forget_old(self) -> None:
        if self._read_at != self._changes():
            self.forget()

    def _fetched(self, deadline: Deadline | None = None) -> dict[str, torch.Tensor | None]:
        self._forget_old()
        if self._read is None:
            self._read_at = self._changes()
            held = self._run(self._calls.held_gradients(None), deadline)
            self._read = {each.remote_name: held.get(each.remote_name) for each in self.parameters}
            self._as_read = {name: None if each is None else each.clone() for name, each in self._read.items()}
        for each in self.parameters:
            here = _taken(each)
            if here is not None:
                _slot.__set__(each, None)
                there = self._read[each.remote_name]
                self._read[each.remote_name] = here if there is None else there + here
        return self._read


def _taken(parameter: RemoteParameter) -> torch.Tensor | None:
    with torch._C.DisableTorchFunctionSubclass():
        return _slot.__get__(parameter)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # By bits: a number that is none equals itself here.
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))
