"""The requests of training steps: each as `ModelCalls.train_step` makes it, the later ones of a kind without all that.

What is the same in all steps of a loop is kept of the first; of those that follow, only the tensors' bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from gradwire.calls import Call, ModelCalls
from gradwire.deadline import Deadline
from gradwire.exchange import Exchange
from gradwire_proto.step_template import StepTemplate, template_of
from gradwire_proto.values import StepResult

_MOST_KNOWN = 256

_PLAIN = frozenset(
    (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
)
"""Types whose memory is the bytes that travel."""


class StepRequests:
    """Those of one model. Threads may share it."""

    def __init__(self, calls: ModelCalls) -> None:
        self._calls = calls
        self._known: dict[Hashable, StepTemplate] = {}

    def make(
        self,
        inputs: Any,
        targets: Any,
        lr: float | None = None,
        before_variant: Callable[[], None] = lambda: None,
        deadline: Deadline | None = None,
        *,
        owned: bool,
    ) -> Exchange:
        """The step as it is sent. before_variant, deadline: see `ModelCalls.train_step`, which says what it raises.

        owned: what was given may change before the step is over, so that what may have to be sent again is copied.
        """
        key = None if lr is not None else _kind((inputs, targets))
        template = self._known.get(key) if key is not None else None
        if template is not None:
            call = self._calls.train_step_like(
                template, [_memory(each) for each in (inputs, targets) if each is not None]
            )
            return _exchange_of(*call)
        call = self._calls.train_step(inputs, targets, lr, before_variant, deadline)
        if owned:
            call.own_tensors()
        if key is not None and (template := template_of(call.request)) is not None:
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[key] = template
        return _exchange_of(call, call.request.SerializeToString())


def _exchange_of(call: Call[StepResult], body: bytes) -> Exchange:
    return Exchange(
        method=call.method,
        body=body,
        command=call.command,
        finish=call.finish,
        send_again=call.uploads.send_again if call.uploads else None,
    )


def _kind(batch: tuple[Any, Any]) -> Hashable | None:
    """What tells batches of plain tensors apart; None for all others."""
    inputs, targets = batch
    if not _is_plain(inputs):
        return None
    if targets is None:
        return inputs.dtype, inputs.shape
    return (inputs.dtype, inputs.shape, targets.dtype, targets.shape) if _is_plain(targets) else None


def _is_plain(value: Any) -> bool:
    if type(value) is not torch.Tensor or value.dtype not in _PLAIN or not value.is_cpu:
        return False
    # In this order: sparse and nested tensors refuse to be asked whether they are contiguous.
    return value.layout is torch.strided and not value.is_nested and value.is_contiguous() and not value.is_neg()


def _memory(tensor: torch.Tensor) -> Any:
    # Without a detach where there is nothing to detach: it takes as long as the rest.
    return (tensor.detach() if tensor.requires_grad else tensor).numpy().data
