"""Requests for training steps, parsed: those that are like one before are cut into their parts, without a message."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from gradwire_proto import codec
from gradwire_proto.batch_form import BatchForm, FormedStep, form_of
from gradwire_proto.step_template import StepTemplate, template_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.calls import Call
from gradwire_server.fingerprints import fingerprint
from gradwire_server.known_requests import FIXED_BYTES, KEPT_BYTES, MOST_KNOWN, MOST_SEEN, kind_of
from gradwire_server.request_parsing import parse
from gradwire_server.step_jobs import LoneStep

_METHOD = "TrainStep"


@dataclass(frozen=True, slots=True)
class StepRequest:
    """A step of the model that `name` names."""

    name: str
    step: FormedStep | LoneStep
    call: Call


@dataclass(frozen=True, slots=True)
class _Known:
    """Requests that a template matches have this name, form and learning rate."""

    template: StepTemplate
    name: str
    form: BatchForm
    lr: float | None


class StepRequests:
    """See the module. `request_id`: of the request that was read last, as far as it could be read."""

    def __init__(self, limits: Limits) -> None:
        self.request_id: str | None = None
        self._limits = limits
        self._known: dict[Hashable, _Known] = {}
        self._seen: set[Hashable] = set()
        self._forms: dict[Hashable, BatchForm] = {}
        self._kept = 0
        """Bytes of the requests that brought the forms, less their tensors."""

    def read(self, raw: bytes, *, arrived: float, deadline: float | None = None) -> StepRequest:
        """Raises InvalidArgument or ResourceExhausted."""
        self.request_id = None
        kind = kind_of(raw)
        known = self._known.get(kind)
        if known is None or (parts := known.template.match(raw)) is None:
            return self._parse(raw, Call(arrived=arrived, deadline=deadline), kind)
        data, self.request_id = parts
        call = Call(
            arrived=arrived,
            deadline=deadline,
            method=_METHOD,
            raw=raw,
            request_id=self.request_id,
            body=fingerprint(_METHOD, raw),
        )
        return StepRequest(known.name, FormedStep(known.form, data, known.lr), call)

    def _parse(self, raw: bytes, call: Call, kind: Hashable) -> StepRequest:
        request, call = parse(pb.TrainStepRequest, raw, _METHOD, call, self._limits.message_bytes)
        self.request_id = call.request_id
        lr = codec.decode_learning_rate(request)
        batch = codec.decode_batch(request.batch, "batch", self._limits)
        formed = form_of(batch)
        if formed is None:
            return StepRequest(request.name, LoneStep(batch, lr), call)
        key, data = formed
        fixed = len(raw) - sum(memoryview(each).nbytes for each in data)
        if fixed > FIXED_BYTES:
            return StepRequest(request.name, LoneStep(batch, lr), call)
        form = self._form(key, batch, fixed)
        self._learn(kind, request, raw, form, lr)
        return StepRequest(request.name, FormedStep(form, data, lr), call)

    def _form(self, key: Hashable, batch: Any, fixed: int) -> BatchForm:
        form = self._forms.get(key)
        if form is None:
            self._kept += fixed
            if len(self._forms) >= MOST_KNOWN or self._kept > KEPT_BYTES:
                self._forms.clear()
                self._known.clear()  # They hold forms.
                self._kept = fixed
            form = self._forms[key] = BatchForm(batch)
        return form

    def _learn(
        self, kind: Hashable, request: pb.TrainStepRequest, raw: bytes, form: BatchForm, lr: float | None
    ) -> None:
        """Make a template of what comes for the second time."""
        if kind not in self._seen:
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen.add(kind)
        elif (template := template_of(request, raw)) is not None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[kind] = _Known(template, request.name, form, lr)
