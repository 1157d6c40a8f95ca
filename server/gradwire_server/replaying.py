"""Commands of a journal applied once more: the servicer's own methods take them, as they took them from the client."""

from __future__ import annotations

import logging
import struct
from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gradwire_server.calls import Call, Replay
from gradwire_server.model_records import stored_tensors
from gradwire_server.rpc_handlers import SERVICE
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry

logger = logging.getLogger(__name__)


class Replayer:
    """See the module. `servicer` is set once there is one."""

    servicer: Any = None

    async def apply(self, entry: Entry, journal: Journal, *, answered: bool) -> Message:
        """Apply a command once more; its response. `answered`: whether the response is wanted with its tensors.

        Raises what the command raises.
        """
        kind = GetMessageClass(SERVICE.methods_by_name[entry.method].input_type)
        uploads = {upload.name: stored_tensors(upload, journal) for upload in entry.uploads}
        call = Call(
            method=entry.method,
            raw=bytes(entry.request),
            request_id=entry.request_id,
            body=entry.body,
            replay=Replay(number=entry.number, uploads=uploads, splits=entry.splits, answered=answered),
        )
        return await getattr(self.servicer, entry.method)(kind.FromString(call.raw), call)


def check_same(model: str, entry: Entry, response: Message) -> None:
    """Say so in the log where a command that was applied once more did something else than the first time."""
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


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)
