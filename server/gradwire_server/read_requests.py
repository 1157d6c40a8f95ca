"""Requests for gradients of a model that are like one before: cut into their parts, without a message."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from gradwire_proto import codec
from gradwire_proto.batch_form import BatchForm
from gradwire_proto.request_template import RequestTemplate, bytes_besides_tensors, template_parts
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, GradientQuery, Limits
from gradwire_server.known_requests import FIXED_BYTES, KEPT_BYTES, MOST_KNOWN, MOST_SEEN, kind_of


@dataclass(frozen=True, slots=True)
class GradientRead:
    """What is asked of the model that `name` names. max_inline_bytes: None where no tensor is to travel apart."""

    name: str
    batch: Batch
    query: GradientQuery
    max_inline_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Known:
    """Requests that a template matches have this name, form and query."""

    template: RequestTemplate
    name: str
    form: BatchForm
    query: GradientQuery
    max_inline_bytes: int | None


class ReadRequests:
    """See the module."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._known: dict[Hashable, _Known] = {}
        self._seen: set[Hashable] = set()
        self._kept = 0
        """Bytes of the requests that are known, less their tensors."""

    def read(self, raw: bytes) -> GradientRead | None:
        """What a request asks for; None where it is not like one that `learn` was told."""
        known = self._known.get(kind_of(raw))
        if known is None or (data := known.template.cut(raw)) is None:
            return None
        return GradientRead(known.name, known.form.batch(data), known.query, known.max_inline_bytes)

    def learn(self, request: pb.ComputeGradientsRequest, raw: bytes) -> None:
        """Know requests like this one, which was answered, from the second on."""
        kind = kind_of(raw)
        if kind not in self._seen:
            if len(self._seen) >= MOST_SEEN:
                self._seen.clear()
            self._seen.add(kind)
        elif request.WhichOneof("subject") == "name" and not request.vectors:
            self._keep(kind, request, raw)

    def _keep(self, kind: Hashable, request: pb.ComputeGradientsRequest, raw: bytes) -> None:
        if bytes_besides_tensors(request, raw) > FIXED_BYTES or (parts := template_parts(request, raw)) is None:
            return
        template = RequestTemplate(*parts)
        former = self._known.pop(kind, None)
        self._kept += template.fixed_bytes - (former.template.fixed_bytes if former else 0)
        if len(self._known) >= MOST_KNOWN or self._kept > KEPT_BYTES:
            self._known.clear()
            self._kept = template.fixed_bytes
        form = BatchForm(codec.decode_batch(request.batch, "batch", self._limits))
        max_inline_bytes = codec.decode_max_inline_bytes(request.max_inline_bytes)
        query = codec.decode_gradient_query(request)
        self._known[kind] = _Known(template, request.name, form, query, max_inline_bytes)
