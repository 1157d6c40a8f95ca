"""TrainStep and TrainSteps, from the bytes of requests to those of responses: steps of both take the same turns."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from gradwire_proto.names import parse_model_name
from gradwire_proto.values import Limits
from gradwire_server.admission import Admission
from gradwire_server.calls import Call
from gradwire_server.failures import answer_of
from gradwire_server.hosted_model import HostedModel
from gradwire_server.step_jobs import Chain
from gradwire_server.step_requests import StepRequests
from gradwire_server.step_stream import StepStream
from gradwire_server.stored_replies import encode_reply
from gradwire_server.work_queue import Job


class StepCalls:
    """See the module. `find`: the model of a name."""

    def __init__(
        self,
        find: Callable[[str, Call], Awaitable[HostedModel]],
        limits: Limits,
        admission: Admission,
        stall_seconds: float,
    ) -> None:
        self._find = find
        self._limits = limits
        self._admission = admission
        self._stall_seconds = stall_seconds
        self._requests = StepRequests(limits)

    async def train_step(self, raw: bytes, call: Call) -> bytes:
        """One step alone: the bytes of its TrainStepResponse. `call`: when it arrived, and its deadline."""
        request_id = None
        try:
            try:
                request = self._requests.read(raw, arrived=call.arrived, deadline=call.deadline)
            finally:
                request_id = self._requests.request_id
            model = await self._find(parse_model_name(request.name), request.call)
            job = await model.steps.submit(request.call, request.step, Chain(), 0, at_once=True)
            if call.answered is not None and isinstance(job, Job):
                job.on_end(partial(_answer, call.answered), first=True)
            result = await job.result(call.deadline)
        except Exception as error:
            raise answer_of(error, request_id) from None
        if job.reply is not None:
            return job.reply
        return encode_reply("TrainStep", result).SerializeToString()

    def train_steps(self, messages: AsyncIterator[bytes], call: Call) -> AsyncGenerator[bytes, None]:
        """A stream of steps; see StepStream."""
        return StepStream(self._find, self._limits, self._admission, self._stall_seconds).answers(messages)


def _answer(answered: Callable[[bytes], None], job: Job[Any]) -> None:
    """Hand over the response of a step that has ended well; how another has ended is looked at by who waits for it."""
    if job.error is None and job.reply is not None:
        answered(job.reply)
