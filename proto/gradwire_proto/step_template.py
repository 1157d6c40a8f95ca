"""Requests for training steps that differ in their tensors' bytes and request ids alone, without a message for each.

Most steps of a training loop do. Building and parsing a message takes longer than all else about a small step, and what
is the same in all of them need be built and looked at once: the rest is cut out of the request's bytes, or put in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gradwire_proto.request_template import RequestTemplate, template_parts
from gradwire_proto.v1 import gradient_service_pb2 as pb

_REQUEST_ID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class StepTemplate:
    """What such requests have in common. The request id lies behind the batch."""

    def __init__(self, template: RequestTemplate) -> None:
        self._template = template

    @property
    def size(self) -> int:
        """Bytes of every such request."""
        return self._template.size

    def match(self, raw: bytes) -> tuple[list[Any], str] | None:
        """(the tensors' bytes, the request id) where `raw` is such a request; None where it is not."""
        data = self._template.cut(raw)
        if data is None or _REQUEST_ID.fullmatch(request_id := data.pop()) is None:
            return None
        return data, request_id.decode()

    def fill(self, data: Sequence[Any], request_id: str) -> bytes:
        """The request with these tensors' bytes, as many of each as before, and this id in lower case."""
        return self._template.join([*data, request_id.encode()])


def template_of(request: pb.TrainStepRequest, raw: bytes | None = None) -> StepTemplate | None:
    """The template of this request, whose bytes are `raw`; None where it has to be built and parsed as a message."""
    parts = template_parts(request, raw)
    return None if parts is None else StepTemplate(RequestTemplate(*parts))
