"""The files of a checkpoint beside its manifest: written bit by bit, checked, and read.

model.pb                 what was asked for, as a message gradwire.v1.Model, with all graphs
opened.pb                an architecture's variants, made by the batches that came
weights.safetensors      the module's state_dict, tied tensors under each of their names
extra.safetensors        state/NAME: the tensors that no state_dict has, and those that safetensors has no type for;
                         held/RANK/NAME: each rank's part of the held gradients
optimizer.json           the optimizer's state, its schedule's and its scaler's, with tensors by name
optimizer.safetensors    those tensors
replies.bin              what became of the last requests
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError

from gradwire_proto import codec
from gradwire_proto.v1 import program_pb2
from gradwire_proto.values import ModelState, NamedTensors, StateTensor, TensorData, Variant
from gradwire_server.storage.checkpoint_folders import Draft
from gradwire_server.storage.manifest import (
    EXTRA,
    MODEL,
    OPENED,
    OPTIMIZER,
    OPTIMIZER_TENSORS,
    REPLIES,
    WEIGHTS,
    Manifest,
    StoredFile,
    corrupt,
)
from gradwire_server.storage.nested_values import decode_nested, encode_nested
from gradwire_server.storage.saved_model import SavedModel, decode_replies, encode_replies
from gradwire_server.storage.tensor_files import Sink, holds, read_tensors, write_tensors

T = TypeVar("T")

logger = logging.getLogger(__name__)

_IN_STATE_DICT = ("parameter", "buffer")
_PIECE_BYTES = 1 << 20
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, DecodeError)
"""What bytes can raise that some program put there with all digests right."""


class _Digested:
    """Passes bytes on, counts them, and takes their digest."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._digest = hashlib.sha256()
        self._nbytes = 0

    def write(self, piece: bytes | memoryview) -> None:
        self._sink.write(piece)
        self._digest.update(piece)
        self._nbytes += len(piece)

    @property
    def stored(self) -> StoredFile:
        return StoredFile(self._nbytes, self._digest.hexdigest())


def write_files(draft: Draft, saved: SavedModel) -> dict[str, StoredFile]:
    """Write all of them into a draft; what each must be."""
    optimizer, optimizer_tensors = encode_nested(saved.state.optimizer)
    weights, extra = _divided(saved.state, saved.layout)
    files: dict[str, StoredFile] = {}

    @contextmanager
    def file(name: str) -> Iterator[_Digested]:
        with draft.file(name) as sink:
            digested = _Digested(sink)
            yield digested
        files[name] = digested.stored

    for name, content in ((MODEL, saved.spec), (OPENED, _encode_variants(saved.state.opened)), (OPTIMIZER, optimizer)):
        with file(name) as sink:
            sink.write(content)
    with file(REPLIES) as sink:
        for piece in encode_replies(saved.replies, saved.older):
            sink.write(piece)
    for name, tensors in ((WEIGHTS, weights), (EXTRA, extra), (OPTIMIZER_TENSORS, optimizer_tensors)):
        with file(name) as sink:
            write_tensors(sink, tensors)
    return files


def _divided(state: ModelState, layout: tuple[StateTensor, ...]) -> tuple[NamedTensors, NamedTensors]:
    """(what the module's state_dict has, by its names and under all of them, the rest)."""
    own = {each.name for each in layout if each.alias_of is None}
    assert own == state.tensors.keys(), own ^ state.tensors.keys()
    module = {each.name: state.tensors[each.alias_of or each.name] for each in layout if each.role in _IN_STATE_DICT}
    weights = {name: tensor for name, tensor in module.items() if holds(name, tensor.dtype)}
    extra = {f"state/{name}": tensor for name, tensor in state.tensors.items() if name not in weights}
    for rank, held in enumerate(state.held):
        extra |= {f"held/{rank}/{name}": tensor for name, tensor in (held or {}).items()}
    return weights, extra


def check_file(path: Path, expected: StoredFile, where: str) -> None:
    """Raises FailedPrecondition CHECKPOINT_CORRUPT where a file is not as it was written."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise corrupt(where, path.name, "it is missing") from None
    if size != expected.nbytes:
        raise corrupt(where, path.name, f"it has {size} bytes, and {expected.nbytes} were written")
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    if digest.hexdigest() != expected.sha256:
        raise corrupt(where, path.name, "its bytes are not those that were written")


def read_files(folder: Path, manifest: Manifest, where: str) -> SavedModel:
    """The model in a folder whose files were checked; its tensors stay in them. `where`: the checkpoint, for messages.

    Raises FailedPrecondition CHECKPOINT_CORRUPT where what is in them does not fit together all the same.
    """

    def read(name: str, decode: Callable[[Path], T]) -> T:
        if name not in manifest.files:
            raise corrupt(where, name, "it is missing")
        try:
            return decode(folder / name)
        except _UNREADABLE as error:
            raise corrupt(where, name, f"{error!r:.200}") from error

    weights, extra = read(WEIGHTS, read_tensors), read(EXTRA, read_tensors)
    optimizer_tensors = read(OPTIMIZER_TENSORS, read_tensors)
    if manifest.torch != version("torch"):
        logger.warning(
            "checkpoint %s was written under torch %s, and this is %s: what is computed from here on may differ in its"
            " last bits",
            where,
            manifest.torch,
            version("torch"),
        )
    return SavedModel(
        name=manifest.name,
        model_id=manifest.model_id,
        automatic=manifest.automatic,
        created_at=manifest.created_at,
        request_id=manifest.request_id,
        spec=read(MODEL, Path.read_bytes),
        layout=manifest.tensors,
        workers=manifest.workers,
        state=ModelState(
            tensors=read(WEIGHTS, lambda _: _joined(manifest.tensors, weights, extra)),
            optimizer=read(OPTIMIZER, lambda path: decode_nested(path.read_bytes(), optimizer_tensors)),
            step=manifest.step,
            command=manifest.command,
            trained=manifest.trained,
            held=read(EXTRA, lambda _: _held(manifest.held, extra)),
            splits=manifest.splits,
            opened=read(OPENED, lambda path: _decode_variants(path.read_bytes())),
            threads=manifest.threads,
            kernels=manifest.kernels,
        ),
        replies=read(REPLIES, lambda path: decode_replies(path.read_bytes())),
        torch_version=manifest.torch,
        folder=folder,
    )


def _joined(layout: tuple[StateTensor, ...], weights: NamedTensors, extra: NamedTensors) -> NamedTensors:
    """The tensors of a state, without aliases."""
    own = (each.name for each in layout if each.alias_of is None)
    return {name: weights[name] if name in weights else extra[f"state/{name}"] for name in own}


def _held(names: tuple[tuple[str, ...] | None, ...], extra: NamedTensors) -> tuple[dict[str, TensorData] | None, ...]:
    return tuple(
        None if each is None else {name: extra[f"held/{rank}/{name}"] for name in each}
        for rank, each in enumerate(names)
    )


def _encode_variants(variants: tuple[Variant, ...]) -> bytes:
    message = program_pb2.GraphProgram()
    for variant in variants:
        codec.encode_variant(variant, message.variants.add())
    return message.SerializeToString()


def _decode_variants(content: bytes) -> tuple[Variant, ...]:
    message = program_pb2.GraphProgram.FromString(content)
    return tuple(codec.decode_variant(item, require_graph=False) for item in message.variants)
