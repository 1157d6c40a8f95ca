"""ComputeGradients, from the bytes of requests to those of responses: those like one before are not parsed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from gradwire_proto.encoding.gradient_reply import gradient_reply
from gradwire_proto.names import parse_model_name
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.calls import Call
from gradwire_server.hosted_model import HostedModel
from gradwire_server.read_requests import ReadRequests
from gradwire_server.request_parsing import parse

Answer = Callable[[pb.ComputeGradientsRequest, Call], Awaitable[pb.ComputeGradientsResponse]]
"""The servicer's method."""


class ReadCalls:
    """See the module. `find`: the model of a name. `answer`: takes the requests that have to be parsed."""

    def __init__(self, find: Callable[[str, Call], Awaitable[HostedModel]], answer: Answer, limits: Limits) -> None:
        self._find = find
        self._answer = answer
        self._message_bytes = limits.message_bytes
        self._requests = ReadRequests(limits)

    async def compute_gradients(self, raw: bytes, call: Call) -> bytes:
        """The bytes of a ComputeGradientsResponse. `call`: when the request arrived, and its deadline."""
        read = self._requests.read(raw)
        if read is None:
            request, call = parse(pb.ComputeGradientsRequest, raw, "ComputeGradients", call, self._message_bytes)
            response = await self._answer(request, call)
            self._requests.learn(request, raw)
            return response.SerializeToString()
        model = await self._find(parse_model_name(read.name), call)
        result = await model.compute_gradients(read.batch, read.query, None, read.max_inline_bytes, call)
        return gradient_reply(result)
