"""Checkpoints by key: "named/NAME", and "auto/MODEL/NUMBER" for those that nobody asked for."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from google.protobuf.message import DecodeError

from gradwire_proto import codec
from gradwire_proto.errors import CheckpointNotFound, FailedPrecondition, InvalidArgument
from gradwire_proto.names import checkpoint_name
from gradwire_proto.v1 import program_pb2
from gradwire_proto.values import Checkpoint, ModelState, NamedTensors, StateTensor, TensorData, Variant
from gradwire_server.storage.checkpoint_folders import Draft, Folders, storage_errors, taken
from gradwire_server.storage.local_folders import LocalFolders
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
    decode_manifest,
    encode_manifest,
)
from gradwire_server.storage.nested_values import decode_nested, encode_nested
from gradwire_server.storage.object_folders import ObjectFolders
from gradwire_server.storage.saved_model import SavedModel, decode_replies, encode_replies
from gradwire_server.storage.tensor_files import Sink, holds, read_tensors, write_tensors

T = TypeVar("T")

logger = logging.getLogger(__name__)

_IN_STATE_DICT = ("parameter", "buffer")
_PIECE_BYTES = 1 << 20
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, DecodeError)
"""What bytes can raise that some program put there with all digests right."""


def key_of(name: str) -> str:
    """The key of what `Checkpoint.name` says: "best", or "digits/100" of an automatic one."""
    return f"auto/{name}" if "/" in name else f"named/{name}"


class CheckpointStore:
    """Checkpoints in a folder, or wherever fsspec reaches. Every method may block, and is for any thread.

    url: a path, or a URL such as s3://bucket/folder with fsspec's `options` for it. cache: the service's own folder for
    files that are fetched from there. fence: raises where another service has taken over the storage. patience: seconds
    that one call of a remote store may take.

    Raises ResourceExhausted STORAGE_FULL, FailedPrecondition STORAGE_READ_ONLY, Unavailable STORAGE_UNREACHABLE, and
    ConfigError for a URL that means nothing.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        options: Mapping[str, str] | None = None,
        *,
        fence: Callable[[], None] = lambda: None,
        patience: float = 30.0,
    ) -> None:
        scheme, separator, path = url.partition("://")
        self._folders: Folders
        if not separator or scheme == "file":
            self._folders = LocalFolders(Path(path if separator else url), fence)
        else:
            self._folders = ObjectFolders(url, options or {}, cache, fence, patience)
        self._claims: set[str] = set()
        self._lock = threading.Lock()

    def write(self, key: str, saved: SavedModel) -> Checkpoint:
        """Make a checkpoint, all of it or nothing. An automatic one takes the place of one with the same number.

        AlreadyExists CHECKPOINT_EXISTS where the name is taken, but for the request that made that one: it gets the
        first answer.
        """
        with self._claimed(key):
            if not saved.automatic and (first := self.answered(key, saved.model_id, saved.request_id)):
                return first
            with self._folders.draft(key, replace=saved.automatic) as draft:
                manifest = Manifest.of(saved, _write_files(draft, saved))
                draft.commit(encode_manifest(manifest))
        return manifest.checkpoint()

    def answered(self, key: str, model_id: str, request_id: str | None) -> Checkpoint | None:
        """The checkpoint that this request made, None where there is none. AlreadyExists where another made it."""
        content = self._folders.manifest(key)
        if content is None:
            return None
        found = decode_manifest(content, _name(key))
        if request_id is None or found.request_id != request_id:
            raise taken(key)
        if found.model_id != model_id:
            raise InvalidArgument(
                f"{request_id} was the id of another request; each needs its own",
                field="request_id",
                reason="REQUEST_ID_REUSED",
            )
        return found.checkpoint()

    def get(self, key: str) -> Checkpoint:
        """What clients see of a checkpoint; of its files only the manifest is looked at. CheckpointNotFound."""
        return self._manifest(key).checkpoint()

    def read(self, key: str) -> SavedModel:
        """The model of a checkpoint. Its tensors are segments of files that belong to the caller (see `remove_files`).

        CheckpointNotFound; FailedPrecondition CHECKPOINT_VERSION, and CHECKPOINT_CORRUPT where a single bit is wrong.
        """
        manifest = self._manifest(key)
        folder = self._folders.fetch(key, list(manifest.files))
        try:
            with storage_errors(str(folder)):
                for name, expected in manifest.files.items():
                    _check_file(folder / name, expected, _name(key))
                return _read_files(folder, manifest, _name(key))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FailedPrecondition) and self._folders.manifest(key) is None:
                # Deleted meanwhile.
                raise _not_found(key) from None
            raise

    def list(self, prefix: str = "") -> list[Checkpoint]:
        """The checkpoints whose key starts with `prefix`, by key. Those that cannot be read are logged and left out."""
        found = []
        for key in self._folders.keys(prefix):
            try:
                found.append(self.get(key))
            except CheckpointNotFound:
                pass
            except FailedPrecondition as error:
                logger.warning("%s", error)
        return found

    def automatic(self, model_id: str) -> list[int]:
        """The numbers of a model's automatic checkpoints, newest first."""
        keys = self._folders.keys(f"auto/{model_id}/")
        numbers = (key.rpartition("/")[2] for key in keys)
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def newest(self, model_id: str) -> str | None:
        """The key of a model's newest automatic checkpoint."""
        numbers = self.automatic(model_id)
        return f"auto/{model_id}/{numbers[0]}" if numbers else None

    def delete(self, key: str) -> None:
        """Remove a checkpoint. CheckpointNotFound."""
        if self._folders.manifest(_checked(key)) is None:
            raise _not_found(key)
        self._folders.delete(key)

    def delete_automatic(self, model_id: str) -> None:
        """Remove every automatic checkpoint of a model that goes."""
        for number in self.automatic(model_id):
            self._folders.delete(f"auto/{model_id}/{number}")

    def sweep(self) -> None:
        """Remove what earlier services left half-written. For a service that has just taken the storage over."""
        self._folders.sweep()

    def _manifest(self, key: str) -> Manifest:
        content = self._folders.manifest(_checked(key))
        if content is None:
            raise _not_found(key)
        return decode_manifest(content, _name(key))

    @contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        """Inside, nobody else writes there."""
        with self._lock:
            if _checked(key) in self._claims:
                raise taken(key)
            self._claims.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._claims.remove(key)


# --- files --------------------------------------------------------------------------------------------------------


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


def _write_files(draft: Draft, saved: SavedModel) -> dict[str, StoredFile]:
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
        for piece in encode_replies(saved.replies):
            sink.write(piece)
    for name, tensors in ((WEIGHTS, weights), (EXTRA, extra), (OPTIMIZER_TENSORS, optimizer_tensors)):
        with file(name) as sink:
            write_tensors(sink, tensors)
    return files


def _divided(state: ModelState, layout: tuple[StateTensor, ...]) -> tuple[NamedTensors, NamedTensors]:
    """(what the module's state_dict has, by its names and under all of them, the rest)."""
    own = {each.name for each in layout if each.alias_of is None}
    assert own == state.tensors.keys(), own ^ state.tensors.keys()
    weights = {each.name: state.tensors[each.alias_of or each.name] for each in layout if _is_weight(each)}
    extra = {f"state/{name}": tensor for name, tensor in state.tensors.items() if name not in weights}
    for rank, held in enumerate(state.held):
        extra |= {f"held/{rank}/{name}": tensor for name, tensor in (held or {}).items()}
    return weights, extra


def _is_weight(tensor: StateTensor) -> bool:
    return tensor.role in _IN_STATE_DICT and holds(tensor.name, tensor.dtype)


def _check_file(path: Path, expected: StoredFile, where: str) -> None:
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


def _read_files(folder: Path, manifest: Manifest, where: str) -> SavedModel:
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
        ),
        replies=read(REPLIES, lambda path: decode_replies(path.read_bytes())),
        torch_version=manifest.torch,
        folder=folder,
    )


def _joined(layout: tuple[StateTensor, ...], weights: NamedTensors, extra: NamedTensors) -> NamedTensors:
    """The tensors of a state, without aliases."""
    tensors = {}
    for each in layout:
        if each.alias_of is None:
            found = weights[each.name] if _is_weight(each) else extra[f"state/{each.name}"]
            if (found.dtype, found.shape) != (each.dtype, each.shape):
                raise ValueError(f"{each.name!r:.80} is {found.dtype}{list(found.shape)}, not what the manifest says")
            tensors[each.name] = found
    return tensors


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


# --- keys ---------------------------------------------------------------------------------------------------------


def _checked(key: str) -> str:
    """`key`, which becomes a path: nothing but what `key_of` gives for a checkpoint's name."""
    kind, _, name = key.partition("/")
    if kind not in ("auto", "named") or ("/" in name) != (kind == "auto"):
        raise ValueError(f"no key of a checkpoint: {key!r:.100}")
    checkpoint_name(name)
    return key


def _name(key: str) -> str:
    return key.partition("/")[2]


def _not_found(key: str) -> CheckpointNotFound:
    name = _name(key)
    return CheckpointNotFound(
        f"there is no checkpoint {name!r}", reason="CHECKPOINT_NOT_FOUND", resource=checkpoint_name(name)
    )
