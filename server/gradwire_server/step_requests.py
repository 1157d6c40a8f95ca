"""Requests for training steps, parsed: a message for the first of each kind, and none for those that are like it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from gradwire_proto import codec
from gradwire_proto.batch_form import BatchForm, FormedStep, form_of
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import parse_model_name
from gradwire_proto.step_template import StepTemplate, template_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.calls import Call
from gradwire_server.fingerprints import fingerprint
from gradwire_server.hosted_model import HostedModel
from gradwire_server.request_parsing import parse
from gradwire_server.step_runs import LoneStep

_METHOD = "TrainStep"
_MOST_KNOWN = 64


@dataclass(frozen=True, slots=True)
class _Known:
    """Requests that a template matches have this form and learning rate."""

    template: StepTemplate
    form: BatchForm
    lr: float | None


class StepRequests:
    """Those of one stream, which are all of one model. `find`: the model of a name."""

    def __init__(self, find: Callable[[str, Call], Awaitable[HostedModel]], limits: Limits) -> None:
        self.request_id: str | None = None
        """Of the request that was read last, as far as it could be read."""
        self._find = find
        self._limits = limits
        self._name: str | None = None
        self._model: HostedModel | None = None
        self._known: dict[int, _Known] = {}
        """By the bytes of the request."""
        self._forms: dict[Any, BatchForm] = {}

    @property
    def model(self) -> HostedModel:
        """The model, once a step was read."""
        assert self._model is not None
        return self._model

    async def read(self, raw: bytes, arrived: float) -> tuple[FormedStep | LoneStep, Call]:
        """The step, and its call. Raises what its own request would: InvalidArgument, ModelNotFound and others."""
        self.request_id = None
        known = self._known.get(len(raw))
        if known is not None and (parts := known.template.match(raw)) is not None:
            data, request_id = parts
            call = Call(arrived=arrived, method=_METHOD, raw=raw, request_id=request_id, body=fingerprint(_METHOD, raw))
            return FormedStep(known.form, data, known.lr), call
        return await self._parse(raw, Call(arrived=arrived))

    async def _parse(self, raw: bytes, call: Call) -> tuple[FormedStep | LoneStep, Call]:
        request, call = parse(pb.TrainStepRequest, raw, _METHOD, call, self._limits.message_bytes)
        self.request_id = call.request_id
        lr = codec.decode_learning_rate(request)
        if self._model is None:
            self._name, self._model = request.name, await self._find(parse_model_name(request.name), call)
        elif request.name != self._name:
            message = f"the steps of one stream are of one model: {self._name}"
            raise InvalidArgument(message, field="name", reason="MODEL_DIFFERS")
        batch = codec.decode_batch(request.batch, "batch", self._limits)
        formed = form_of(batch)
        if formed is None:
            return LoneStep(batch, lr), call
        key, data = formed
        if len(self._forms) >= _MOST_KNOWN:
            self._forms.clear()
            self._known.clear()
        form = self._forms.setdefault(key, BatchForm(batch))
        template = template_of(request, raw)
        if template is not None:
            self._known[template.size] = _Known(template, form, lr)
        return FormedStep(form, data, lr), call
