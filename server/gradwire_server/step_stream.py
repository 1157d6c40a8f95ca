"""A stream of training steps: taken as they come, answered in order, and never more of them held than may be."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

from google.protobuf.message import DecodeError

from gradwire_proto.encoding.repeated_bytes import join_items, split_items
from gradwire_proto.errors import DeadlineExceeded, GradwireError, InvalidArgument
from gradwire_proto.names import parse_model_name
from gradwire_proto.status import to_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Limits
from gradwire_server.admission import Admission, draining
from gradwire_server.calls import Call
from gradwire_server.failures import answer_of
from gradwire_server.hosted_model import HostedModel
from gradwire_server.step_jobs import Chain, behind_refused
from gradwire_server.step_requests import StepRequest, StepRequests
from gradwire_server.stored_replies import EndedCommand, encode_reply
from gradwire_server.work_queue import Job

BYTES_AHEAD = 16 << 20
"""Requests of one stream that wait or run have about so many bytes at most: more are not read before."""

MOST_STEPS = 4096
"""Of one message: nobody else is answered while they are told apart."""

MOST_BYTES = 8 << 20
"""Of one message with several steps: all of it stays until the last of them is taken."""

Item = Job[Any] | EndedCommand | GradwireError


class StepStream:
    """One call of TrainSteps. `find`: the model of a name."""

    def __init__(
        self,
        find: Callable[[str, Call], Awaitable[HostedModel]],
        limits: Limits,
        admission: Admission,
        stall_seconds: float,
    ) -> None:
        self._find = find
        self._model: tuple[str, HostedModel] | None = None
        self._requests = StepRequests(limits)
        self._admission = admission
        self._stall_seconds = stall_seconds
        self._most = max(1, limits.requests_per_model // 4)
        self._chain = Chain()
        self._place = 0
        """Of the next step that comes."""
        self._items: deque[tuple[Item, int]] = deque()
        """Steps that are not answered yet, in order, and the bytes of their requests."""
        self._bytes = 0
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._moved = time.monotonic()

    async def answers(self, messages: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """The responses, as they become known.

        Ends with the error of the stream itself, once all that it brought is answered: a message that is none,
        Unavailable DRAINING, DeadlineExceeded STREAM_STALLED.
        """
        reader = asyncio.ensure_future(self._read(messages))
        reader.add_done_callback(lambda _: self._news.set())
        stopped: list[GradwireError] = []

        def stop(error: GradwireError) -> None:
            if not reader.done():
                stopped.append(error)
                reader.cancel()

        watch = asyncio.ensure_future(self._watch(stop))
        try:
            with self._admission.stops(lambda: stop(draining())):
                while True:
                    self._news.clear()
                    if (response := self._ended()) is not None:
                        yield response
                        self._moved = time.monotonic()
                    elif self._items or not reader.done():
                        await self._news.wait()
                    else:
                        break
            if stopped:
                raise stopped[0]
            reader.result()
        finally:
            watch.cancel()
            reader.cancel()
            for item, _ in self._items:
                if isinstance(item, Job):
                    item.leave()

    async def _watch(self, stop: Callable[[GradwireError], None]) -> None:
        """A client that neither sends nor waits must not keep its place for ever."""
        while True:
            rest = self._moved + self._stall_seconds - time.monotonic()
            if self._items:
                rest = self._stall_seconds
            if rest <= 0:
                message = f"no step came for {self._stall_seconds:g} s, as long as the server's setting stall_seconds"
                stop(DeadlineExceeded(f"{message} allows", reason="STREAM_STALLED"))
                return
            await asyncio.sleep(rest)

    # --- what comes -----------------------------------------------------------------------------------------------

    async def _read(self, messages: AsyncIterator[bytes]) -> None:
        async for message in messages:
            self._moved = time.monotonic()
            await self._take_all(message)
            message = b""  # The next one may be long in coming.

    async def _take_all(self, message: bytes) -> None:
        arrived = self._moved
        for raw in _steps_of(message):
            while len(self._items) >= self._most or self._bytes >= BYTES_AHEAD:
                self._room.clear()
                await self._room.wait()
            item = await self._take(raw, arrived)
            if isinstance(item, Job):
                item.join()
                item.on_end(lambda _: self._news.set())
            elif isinstance(item, GradwireError) or item.error is not None:
                self._chain.refused(self._place)
            self._items.append((item, len(raw)))
            self._place += 1
            self._bytes += len(raw)
            if not isinstance(item, Job) or item.ended:
                self._news.set()

    async def _take(self, raw: bytes, arrived: float) -> Item:
        """The step as it waits in the model's queue, or what became of it already."""
        if self._chain.refuses(self._place):
            return behind_refused()
        try:
            request = self._requests.read(raw, arrived=arrived)
            model = await self._model_of(request)
            item = await model.steps.submit(request.call, request.step, self._chain, self._place)
            if isinstance(item, EndedCommand) and item.is_forgotten:
                raise item.forgotten()
            return item
        except Exception as error:
            return answer_of(error, self._requests.request_id)

    async def _model_of(self, request: StepRequest) -> HostedModel:
        if self._model is None:
            self._model = request.name, await self._find(parse_model_name(request.name), request.call)
        elif self._model[0] != request.name:
            message = f"the steps of one stream are of one model: {self._model[0]}"
            raise InvalidArgument(message, field="name", reason="MODEL_DIFFERS")
        return self._model[1]

    # --- what goes out --------------------------------------------------------------------------------------------

    def _ended(self) -> bytes | None:
        """A response with the outcomes of the first steps, those that are known; None where the first is not."""
        outcomes: list[bytes] = []
        while self._items and (not isinstance(self._items[0][0], Job) or self._items[0][0].ended):
            item, nbytes = self._items.popleft()
            self._bytes -= nbytes
            outcomes.append(_outcome(item))
            if isinstance(item, Job):
                if item.error is not None:
                    self._chain.refused(self._place - len(self._items) - 1)
                item.leave()
        if not outcomes:
            return None
        self._room.set()
        return join_items(outcomes)


def _steps_of(message: bytes) -> list[bytes]:
    try:
        steps = split_items(message)
    except DecodeError:
        kind = pb.TrainStepsRequest.DESCRIPTOR.full_name
        raise InvalidArgument(f"the bytes are no {kind} message", reason="MALFORMED_MESSAGE") from None
    if len(steps) > MOST_STEPS:
        words = f"expected at most {MOST_STEPS} steps in a message, got {len(steps)}"
        raise InvalidArgument(words, field="steps", reason="MESSAGE_TOO_LARGE")
    if len(steps) > 1 and len(message) > MOST_BYTES:
        words = f"expected at most {MOST_BYTES} bytes in a message of several steps, got {len(message)}"
        raise InvalidArgument(words, field="steps", reason="MESSAGE_TOO_LARGE")
    return steps


def _outcome(item: Item) -> bytes:
    """The bytes of a TrainStepsOutcome. Those of a TrainStepResponse are one."""
    if isinstance(item, GradwireError):
        return pb.TrainStepsOutcome(error=to_status(item)).SerializeToString()
    if item.error is not None:
        return _outcome(item.error)
    if item.reply is not None:
        return item.reply
    result = item.value if isinstance(item, Job) else item.answer
    return encode_reply("TrainStep", result).SerializeToString()
