"""Commands of a journal applied once more: the servicer's own methods take them, as they took them from the client."""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gradwire_proto.errors import FailedPrecondition, GradwireError, RankLost
from gradwire_proto.v1.dataset_pb2 import FitStepsRequest, FitStepsResponse
from gradwire_proto.v1.kernels_pb2 import SwapKernelsRequest
from gradwire_server.calls import Call, Replay
from gradwire_server.failures import may_pass
from gradwire_server.fit_records import FIT_STEPS
from gradwire_server.kernel_records import SWAP_KERNELS
from gradwire_server.model_records import stored_tensors
from gradwire_server.restored_model import Restored
from gradwire_server.rpc_handlers import SERVICE
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.stored_replies import EndedCommand, decode_reply, kills_ranks
from gradwire_server.tensors.file_threads import in_thread

logger = logging.getLogger(__name__)

ANSWERED = 8
"""How many of the last commands may have been answered to nobody: their answers are made anew where not stored."""

READ_AHEAD = 16
"""Entries of a journal that are read at once, each with a reply of up to 4 MiB."""


_OF_THE_SERVICE: dict[str, type[Message]] = {FIT_STEPS: FitStepsRequest, SWAP_KERNELS: SwapKernelsRequest}
"""Requests of methods that no client calls."""


class Replayer:
    """See the module. `servicer` is set once there is one."""

    servicer: Any = None

    async def apply(self, entry: Entry, journal: Journal, *, answered: bool) -> Message:
        """Apply a command once more; its response. `answered`: whether the response is wanted with its tensors.

        Raises what the command raises.
        """
        kind = _OF_THE_SERVICE.get(entry.method) or _request_of(entry.method)
        uploads = {upload.name: stored_tensors(upload, journal) for upload in entry.uploads}
        call = Call(
            method=entry.method,
            raw=bytes(entry.request),
            request_id=entry.request_id,
            body=entry.body,
            replay=Replay(number=entry.number, uploads=uploads, splits=entry.splits, answered=answered),
        )
        return await getattr(self.servicer, entry.method)(kind.FromString(call.raw), call)


async def apply_again(model: Restored, replayer: Replayer, journal: Journal, entries: Iterator[Entry]) -> None:
    """Apply the entries to a model's ranks, in order. Raises RankLost, and why one cannot be applied any more."""
    newest: deque[Entry] = deque()
    has_fits = False
    # In a thread: every byte of a journal is looked at.
    while read := await in_thread(lambda: list(islice(entries, READ_AHEAD))):
        newest.extend(read)
        has_fits |= any(entry.method == FIT_STEPS for entry in read)
        while len(newest) > ANSWERED:
            await _apply_one(model, replayer, journal, newest.popleft(), answered=False)
    for entry in newest:
        await _apply_one(model, replayer, journal, entry, answered=True)
    if has_fits:
        # The next checkpoint removes the blobs.
        await model.let_go_of_datasets()


async def _apply_one(model: Restored, replayer: Replayer, journal: Journal, entry: Entry, *, answered: bool) -> None:
    await model.release_again(entry.released)
    answered = answered and entry.reply is None and model.wants_answer(entry)
    ended = EndedCommand(entry.number, entry.method, entry.reply)
    if entry.refused is not None:
        ended.error = kills_ranks(entry.refused)
    else:
        try:
            response = await replayer.apply(entry, journal, answered=answered)
        except RankLost:
            raise
        except GradwireError as error:
            if error.outcome != "applied":
                if may_pass(error):
                    raise
                raise FailedPrecondition(
                    f"command {entry.number} of its journal, a {entry.method}, is refused now: {error}",
                    reason="JOURNAL_CORRUPT",
                ) from None
        else:
            _check_same(f"models/{model.id}", entry, response)
            if answered:
                ended.answer = decode_reply(entry.method, response.SerializeToString())
    model.applied_again(entry, ended)


def _request_of(method: str) -> type[Message]:
    return GetMessageClass(SERVICE.methods_by_name[method].input_type)


def _check_same(model: str, entry: Entry, response: Message) -> None:
    """Say so in the log where a command that was applied once more did something else than the first time."""
    if isinstance(response, FitStepsResponse):
        return _check_same_steps(model, entry, response)
    if entry.reply is None or not hasattr(response, "result"):
        return
    first = type(response).FromString(entry.reply).result  # pyright: ignore[reportAttributeAccessIssue]
    again = response.result  # pyright: ignore[reportAttributeAccessIssue]
    if (_bits(first.loss), first.step) != (_bits(again.loss), again.step):
        logger.error(
            "%s: command %d gave loss %r at step %d, and when it was applied once more %r at step %d",
            model,
            entry.number,
            first.loss,
            first.step,
            again.loss,
            again.step,
        )


def _check_same_steps(model: str, entry: Entry, again: FitStepsResponse) -> None:
    if entry.reply is None:
        return
    first = FitStepsResponse.FromString(entry.reply)
    if (list(map(_bits, first.losses)), first.step) != (list(map(_bits, again.losses)), again.step):
        logger.error(
            "%s: the %d steps of a fit up to command %d gave other losses when they were applied once more",
            model,
            entry.commands,
            entry.number,
        )


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)
