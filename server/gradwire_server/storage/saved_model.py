"""A model as a checkpoint holds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire_proto.values import Checkpoint, ModelState, StateTensor, TensorData, leaves
from gradwire_server.tensors.held_files import remove_files, segment_paths

_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredReply:
    """What became of a request with an id. `reply`: the raw response; None where it was refused, or was too large.

    body: `Call.body`. method: the RPC's name. refused: the text of the error of a command that is never tried again.
    ended_at: when it ended, in seconds since 1970; None where that was not noted.
    """

    number: int
    request_id: str
    body: bytes
    method: str
    reply: bytes | None
    refused: str | None = None
    ended_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedModel:
    """Everything that a model is made from again.

    name: as `Checkpoint` has it. request_id: of the request that asked for it, None for one that nobody asked for.
    spec: the raw message gradwire.v1.Model with every variant's graphs, and optimizer and settings as they are now.
    layout: the program's tensors, aliases included, in the order of state_dict. torch_version: what it was saved under.
    folder: the folder of the files that hold the tensors, where they have one of their own, which goes with them.
    older: `reply_line` of requests before those of `replies`; read again, these are there like all others.
    """

    name: str
    model_id: str
    automatic: bool
    created_at: float
    request_id: str | None
    spec: bytes
    layout: tuple[StateTensor, ...]
    workers: int
    state: ModelState
    replies: tuple[StoredReply, ...] = ()
    older: tuple[str, ...] = ()
    torch_version: str = ""
    folder: Path | None = None

    def checkpoint(self, nbytes: int) -> Checkpoint:
        """What clients see of it. nbytes: of its files."""
        return Checkpoint(
            name=self.name,
            model_id=self.model_id,
            step=self.state.step,
            command=self.state.command,
            created_at=self.created_at,
            nbytes=nbytes,
            automatic=self.automatic,
        )

    def remove_files(self) -> None:
        """Remove the files that hold the tensors, which belong to whoever has this. Idempotent."""
        remove_files(state_files(self.state))
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def state_files(state: ModelState) -> set[str]:
    """The files that hold a state's tensors."""
    return segment_paths(_tensors(state))


def _tensors(state: ModelState) -> Iterator[TensorData]:
    yield from state.tensors.values()
    yield from (leaf for _, leaf in leaves(state.optimizer) if isinstance(leaf, TensorData))
    for held in state.held:
        yield from (held or {}).values()


def encode_replies(replies: Sequence[StoredReply], older: Sequence[str] = ()) -> Iterator[bytes]:
    """The length of a list in JSON in 8 bytes, the list, and behind it the responses themselves.

    older: `reply_line` of each that stands before the others, and has no response.
    """
    text = ("[" + ",\n".join([*older, *map(reply_line, replies)]) + "]").encode()
    yield len(text).to_bytes(8, "little")
    yield text
    yield from (each.reply for each in replies if each.reply is not None)


def reply_line(reply: StoredReply) -> str:
    """What the list says of one. Not by json, which takes four times as long: there may be very many."""
    nbytes = "null" if reply.reply is None else len(reply.reply)
    refused = "null" if reply.refused is None else _to_json(reply.refused)
    ended_at = "null" if reply.ended_at is None else repr(reply.ended_at)
    return (
        f'{{"number": {reply.number}, "request_id": {_to_json(reply.request_id)}, "body": "{reply.body.hex()}",'
        f' "method": {_to_json(reply.method)}, "bytes": {nbytes}, "refused": {refused}, "ended_at": {ended_at}}}'
    )


def decode_replies(content: bytes) -> tuple[StoredReply, ...]:
    """The replies. Raises ValueError, KeyError or TypeError where this is not what `encode_replies` gives."""
    start = int.from_bytes(content[:8], "little") + 8
    replies = []
    end = start
    for item in json.loads(content[8:start]):
        begin, end = end, end + (item["bytes"] or 0)
        replies.append(
            StoredReply(
                number=item["number"],
                request_id=item["request_id"],
                body=bytes.fromhex(item["body"]),
                method=item["method"],
                reply=None if item["bytes"] is None else content[begin:end],
                refused=item["refused"],
                ended_at=item.get("ended_at"),
            )
        )
    if end != len(content):
        raise ValueError(f"it has {len(content)} bytes, and should have {end}")
    return tuple(replies)
