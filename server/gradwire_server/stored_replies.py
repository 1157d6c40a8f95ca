"""What commands answered, as the bytes that went out: kept with the journal, so that a repeat gets them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition, GradwireError, InvalidArgument
from gradwire_proto.v1 import dataset_pb2, kernels_pb2, model_pb2
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Handle, tensors_in
from gradwire_server.fit_records import FIT_STEPS, decode_steps_result, encode_steps_result
from gradwire_server.kernel_records import SWAP_KERNELS
from gradwire_server.storage.records import REPLY_BYTES
from gradwire_server.storage.saved_model import StoredReply

SMALL_REPLY_BYTES = 64 << 10
"""More than a reply without tensors has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How one method's result becomes its response, and comes back from it. `large`: it may hold tensors or graphs."""

    encode: Callable[[Any], Message]
    decode: Callable[[bytes], Any]
    large: bool = False


def encode_reply(method: str, result: Any) -> Message:
    """The response of a command's method."""
    return _FORMS[method].encode(result)


def decode_reply(method: str, raw: bytes) -> Any:
    """What the command's work returned, from the bytes of its response."""
    return _FORMS[method].decode(raw)


def stored_reply(method: str, result: Any) -> bytes | None:
    """The bytes to store; None where they are too many, or name a download, which no restart survives."""
    if not _FORMS[method].large:
        return encode_reply(method, result).SerializeToString()
    tensors = tensors_in(_tensors_of(result))
    if any(isinstance(tensor.data, Handle) for tensor in tensors) or sum(t.nbytes for t in tensors) > REPLY_BYTES:
        return None
    raw = encode_reply(method, result).SerializeToString()
    return raw if len(raw) <= REPLY_BYTES else None


def room_for_reply(method: str) -> int:
    """Bytes that the stored reply of a method has at most."""
    return REPLY_BYTES if _FORMS[method].large else SMALL_REPLY_BYTES


@dataclass(slots=True)
class EndedCommand:
    """A command that has ended, as it is stored: its number, and its reply's bytes or the error that refused it.

    `reply` None and `error` None: it was applied, and its reply was not stored; `answer` is what it answered where
    that is known all the same, because it was applied once more to ranks that had not seen it.
    """

    number: int
    method: str
    reply: bytes | None
    error: GradwireError | None = None
    answer: Any = None
    ended: bool = True

    @property
    def is_forgotten(self) -> bool:
        """Whether it was applied, and what it answered is not known."""
        return self.error is None and self.reply is None and self.answer is None

    async def wait(self) -> None:
        """It has ended."""

    async def result(self, deadline: float | None) -> Any:
        """What it answered. Raises FailedPrecondition REPLY_FORGOTTEN (outcome applied) where that is not known."""
        if self.error is not None:
            raise copy.copy(self.error)
        if self.reply is not None:
            return decode_reply(self.method, self.reply)
        if self.answer is not None:
            return self.answer
        raise self.forgotten()

    def forgotten(self) -> FailedPrecondition:
        """What is told where its reply is not known."""
        return FailedPrecondition(
            "the command was applied, and its reply was too large to be stored",
            reason="REPLY_FORGOTTEN",
            outcome="applied",
        )


def kills_ranks(text: str) -> InvalidArgument:
    """The error of a command that has ended its ranks' processes twice."""
    return InvalidArgument(text, reason="COMMAND_KILLS_RANKS")


def ended_command(reply: StoredReply) -> EndedCommand:
    """What a checkpoint says of a request."""
    error = None if reply.refused is None else kills_ranks(reply.refused)
    return EndedCommand(reply.number, reply.method, reply.reply, error)


def stored_reply_of(request_id: str, body: bytes, ended: EndedCommand, ended_at: float) -> StoredReply:
    """The same for a checkpoint. ended_at: in seconds since 1970."""
    return StoredReply(
        number=ended.number,
        request_id=request_id,
        body=body,
        method=ended.method,
        reply=ended.reply,
        refused=None if ended.error is None else ended.error.message,
        ended_at=ended_at,
    )


def _tensors_of(result: Any) -> Any:
    return getattr(result, "outputs", None) or getattr(result, "input_gradients", None)


def _step_form(response: type[Any]) -> _Form:
    def encode(result: Any) -> Message:
        message = response()
        # In its place: a copy takes as long again.
        codec.encode_step_result(result, message.result)
        return message

    return _Form(
        encode=encode,
        decode=lambda raw: codec.decode_step_result(response.FromString(raw).result),
    )


def _counting_form(response: type[Any]) -> _Form:
    """Of a method that answers the step that the model is at."""
    return _Form(encode=lambda step: response(step=step), decode=lambda raw: response.FromString(raw).step)


_MODEL = _Form(
    encode=codec.encode_model_info,
    decode=lambda raw: codec.decode_model_info(model_pb2.Model.FromString(raw)),
    large=True,
)

_FORMS = {
    "TrainStep": _step_form(pb.TrainStepResponse),
    "ForwardBackward": _step_form(pb.ForwardBackwardResponse),
    "OptimizerStep": _step_form(pb.OptimizerStepResponse),
    FIT_STEPS: _Form(
        encode=encode_steps_result, decode=lambda raw: decode_steps_result(dataset_pb2.FitStepsResponse.FromString(raw))
    ),
    SWAP_KERNELS: _Form(encode=lambda _: kernels_pb2.SwapKernelsResponse(), decode=lambda _: None),
    "ZeroGrad": _Form(encode=lambda _: pb.ZeroGradResponse(), decode=lambda _: None),
    "LoadStateDict": _counting_form(pb.LoadStateDictResponse),
    "LoadOptimizerState": _counting_form(pb.LoadOptimizerStateResponse),
    "SetGradients": _counting_form(pb.SetGradientsResponse),
    "Forward": _Form(
        encode=codec.encode_forward_result,
        decode=lambda raw: codec.decode_forward_result(pb.ForwardResponse.FromString(raw)),
        large=True,
    ),
    "Backward": _Form(
        encode=codec.encode_backward_result,
        decode=lambda raw: codec.decode_backward_result(pb.BackwardResponse.FromString(raw)),
        large=True,
    ),
    "UpdateModel": _MODEL,
    "AddVariant": _MODEL,
    "CreateModel": _MODEL,
    "RestoreModel": _MODEL,
}
