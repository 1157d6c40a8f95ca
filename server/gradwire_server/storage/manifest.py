"""The manifest of a checkpoint: what is in it, of which version, and how to tell whether it is whole.

{"format": "gradwire-checkpoint", "version": 1, "sha256": "of all that follows this line",
"checkpoint": {"gradwire": "0.1.0", "torch": "2.13.0", "name": ..., "step": ..., "files": {...}, ...}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from types import NoneType
from typing import Any

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import BatchShapes, Checkpoint, LeafShape, SplitDecision, StateTensor
from gradwire_server.storage.records import decode_split
from gradwire_server.storage.saved_model import SavedModel

MANIFEST = "manifest.json"
MODEL = "model.pb"
OPENED = "opened.pb"
WEIGHTS = "weights.safetensors"
EXTRA = "extra.safetensors"
OPTIMIZER = "optimizer.json"
OPTIMIZER_TENSORS = "optimizer.safetensors"
REPLIES = "replies.bin"

FILES = (MODEL, OPENED, WEIGHTS, EXTRA, OPTIMIZER, OPTIMIZER_TENSORS, REPLIES)
"""Every file beside the manifest."""

FORMAT, VERSION = "gradwire-checkpoint", 1


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a file must be: its size and the SHA-256 of its bytes, in hexadecimal digits."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A checkpoint but for its tensors. The fields are those of SavedModel and ModelState; `held`: names, by rank.

    gradwire, torch: the versions that wrote it. files: every one of `FILES`. place: what stands before their names
    where they are kept.
    """

    gradwire: str
    torch: str
    name: str
    model_id: str
    automatic: bool
    created_at: float
    request_id: str | None
    step: int
    command: int
    workers: int
    threads: int
    tensors: tuple[StateTensor, ...]
    trained: tuple[str, ...]
    held: tuple[tuple[str, ...] | None, ...]
    splits: Mapping[str, SplitDecision]
    kernels: tuple[BatchShapes, ...]
    files: Mapping[str, StoredFile]
    place: str

    @classmethod
    def of(cls, saved: SavedModel, files: Mapping[str, StoredFile], place: str) -> Manifest:
        """The manifest of a model whose files are these."""
        state = saved.state
        return cls(
            gradwire=version("gradwire"),
            # From the installed package's metadata: importing torch would take seconds and memory.
            torch=version("torch"),
            name=saved.name,
            model_id=saved.model_id,
            automatic=saved.automatic,
            created_at=saved.created_at,
            request_id=saved.request_id,
            step=state.step,
            command=state.command,
            workers=saved.workers,
            threads=state.threads,
            tensors=saved.layout,
            trained=state.trained,
            held=tuple(None if names is None else tuple(names) for names in state.held),
            splits=state.splits,
            kernels=state.kernels,
            files=files,
            place=place,
        )

    @property
    def names(self) -> dict[str, str]:
        """The names that the files have where they are kept, by their own."""
        return {name: f"{self.place}{name}" for name in self.files}

    def checkpoint(self) -> Checkpoint:
        """What clients see of it."""
        return Checkpoint(
            name=self.name,
            model_id=self.model_id,
            step=self.step,
            command=self.command,
            created_at=self.created_at,
            nbytes=sum(file.nbytes for file in self.files.values()),
            automatic=self.automatic,
        )


def encode_manifest(manifest: Manifest) -> bytes:
    """The content of `MANIFEST`."""
    fields = {"checkpoint": asdict(manifest)}
    # Without the brace that opens it: that stands in the head.
    body = json.dumps(fields, ensure_ascii=False, allow_nan=False, indent=1).encode()[1:].lstrip() + b"\n"
    return _head(VERSION, hashlib.sha256(body).hexdigest()) + body


def decode_manifest(content: bytes, where: str) -> Manifest:
    """The manifest. `where`: the checkpoint, for messages.

    Raises FailedPrecondition: CHECKPOINT_VERSION for one of another version, CHECKPOINT_CORRUPT for one that is not as
    it was written.
    """
    try:
        fields = json.loads(content)
        found, number = fields["format"], fields["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise corrupt(where, MANIFEST, f"it is no manifest ({error!r:.100})") from None
    if found != FORMAT or type(number) is not int:
        raise corrupt(where, MANIFEST, f"it is no manifest of a checkpoint: its format is {found!r:.80}")
    if number != VERSION:
        raise FailedPrecondition(
            f"checkpoint {where} has version {number} of the format, and this service reads version {VERSION}",
            reason="CHECKPOINT_VERSION",
        )
    head, _, body = content.partition(b"\n")
    if head + b"\n" != _head(VERSION, hashlib.sha256(body).hexdigest()):
        raise corrupt(where, MANIFEST, "its bytes are not those that were written")
    try:
        return _decode(fields["checkpoint"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise corrupt(where, MANIFEST, f"a field is missing or wrong ({error!r:.100})") from None


def corrupt(where: str, file: str, problem: str) -> FailedPrecondition:
    """The error of a file of a checkpoint that is not as it was written."""
    return FailedPrecondition(f"checkpoint {where}: {file}: {problem}", reason="CHECKPOINT_CORRUPT")


def _head(number: int, digest: str) -> bytes:
    return f'{{"format": "{FORMAT}", "version": {number}, "sha256": "{digest}",\n'.encode()


def _decode(fields: dict[str, Any]) -> Manifest:
    return Manifest(
        gradwire=_typed(fields, "gradwire", str),
        torch=_typed(fields, "torch", str),
        name=_typed(fields, "name", str),
        model_id=_typed(fields, "model_id", str),
        step=_count(fields, "step"),
        command=_count(fields, "command"),
        workers=_count(fields, "workers"),
        threads=_count(fields, "threads"),
        automatic=_typed(fields, "automatic", bool),
        created_at=_typed(fields, "created_at", float),
        request_id=_typed(fields, "request_id", str, NoneType),
        tensors=tuple(StateTensor(**{**each, "shape": tuple(each["shape"])}) for each in fields["tensors"]),
        trained=tuple(fields["trained"]),
        held=tuple(None if names is None else tuple(names) for names in fields["held"]),
        splits={name: decode_split(each) for name, each in fields["splits"].items()},
        # Those that were written first have none.
        kernels=tuple(_shapes(each) for each in fields.get("kernels", ())),
        files={name: _file(name, each) for name, each in fields["files"].items()},
        place=_place(fields),
    )


def _shapes(fields: dict[str, Any]) -> BatchShapes:
    return BatchShapes(_typed(fields, "variant", str), _leaves(fields["inputs"]), _leaves(fields["targets"]))


def _leaves(shapes: Iterable[Iterable[int] | None]) -> tuple[LeafShape, ...]:
    return tuple(None if shape is None else tuple(map(int, shape)) for shape in shapes)


def _place(fields: dict[str, Any]) -> str:
    """Those that were written first have none."""
    place = _typed(fields, "place", str) if "place" in fields else ""
    if "/" in place:
        raise ValueError(f"place is {place!r:.40}")
    return place


def _typed(fields: dict[str, Any], name: str, *types: type) -> Any:
    if type(fields[name]) not in types:
        raise TypeError(f"{name} is {fields[name]!r:.40}")
    return fields[name]


def _count(fields: dict[str, Any], name: str) -> int:
    if _typed(fields, name, int) < 0:
        raise ValueError(f"{name} is {fields[name]}")
    return fields[name]


def _file(name: str, fields: dict[str, Any]) -> StoredFile:
    # Names become paths.
    if name not in FILES:
        raise ValueError(f"no file is named {name!r:.40}")
    return StoredFile(_count(fields, "nbytes"), _typed(fields, "sha256", str))
