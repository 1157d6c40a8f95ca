"""The files of one dataset: its tensors, one after another, and what is known of them."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from gradwire_proto.codec import decode_dataset, encode_dataset
from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.v1 import dataset_pb2
from gradwire_proto.values import Batch, DatasetInfo, Segment, TensorData, leaves, map_leaves
from gradwire_server.fingerprints import file_fingerprint
from gradwire_server.storage.durable_files import replace_file, sync_file, sync_folder
from gradwire_server.storage.tensor_files import ALIGNMENT

_DATA = "data"
_DESCRIPTION = "dataset.json"
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredDataset:
    """A dataset as it lies in its folder. `upload`: "uploads/{upload}", a name that no other content has.

    fingerprint: of the file. made_by, body: id and fingerprint of the request that made it, if it had an id.
    """

    info: DatasetInfo
    folder: Path
    upload: str
    fingerprint: bytes
    made_by: str | None = None
    body: bytes = b""

    @property
    def path(self) -> Path:
        """The file of all tensors."""
        return self.folder / _DATA

    @property
    def tensors(self) -> list[TensorData]:
        """Where each tensor lies, in the order of inputs and targets."""
        described = _tensors(Batch(self.info.inputs, self.info.targets))
        return [
            replace(tensor, data=Segment(str(self.path), offset, tensor.nbytes))
            for tensor, offset in zip(described, _offsets(described), strict=False)
        ]

    def forget(self, durable: bool) -> None:
        """From here on nobody finds it in the storage; the tensors are still there. Raises OSError. Blocks."""
        (self.folder / _DESCRIPTION).unlink(missing_ok=True)
        if durable:
            sync_folder(self.folder)

    def remove(self) -> None:
        """Remove all of it. Blocks."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def batch(self) -> Batch:
        """All examples, where they lie."""
        return batch_of(self.info, self.tensors)


def batch_of(info: DatasetInfo, tensors: Sequence[TensorData]) -> Batch:
    """All examples of a dataset, nested, of its tensors in order."""
    following = iter(tensors)

    def placed(leaf: Any) -> Any:
        return next(following) if isinstance(leaf, TensorData) else leaf

    return Batch(map_leaves(placed, info.inputs), map_leaves(placed, info.targets))


def write_dataset(folder: Path, stored: StoredDataset, batch: Batch, *, durable: bool) -> StoredDataset:
    """Write the files of a new dataset into `folder`, which is there. `stored` with its fingerprint. Raises OSError."""
    tensors = _tensors(batch)
    with open(folder / _DATA, "wb") as file:
        for tensor, offset in zip(tensors, _offsets(tensors), strict=False):
            file.seek(offset)
            if isinstance(tensor.data, Segment):
                file.flush()
                _copy(tensor.data, file.fileno())
            else:
                file.write(memoryview(tensor.data).cast("B") if tensor.nbytes else b"")  # pyright: ignore[reportArgumentType]
    if durable:
        sync_file(folder / _DATA)
    stored = replace(stored, fingerprint=file_fingerprint(folder / _DATA))
    words = {
        "version": _VERSION,
        "dataset": base64.b64encode(encode_dataset(stored.info).SerializeToString()).decode(),
        "upload": stored.upload,
        "fingerprint": stored.fingerprint.hex(),
        "made_by": stored.made_by,
        "body": stored.body.hex(),
    }
    if durable:
        replace_file(folder / _DESCRIPTION, json.dumps(words).encode())
        sync_folder(folder)
    else:
        (folder / _DESCRIPTION).write_text(json.dumps(words))
    return stored


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is of a dataset that was never whole, or was deleted."""
    return folder.name.startswith(".") or not (folder / _DESCRIPTION).exists()


def read_dataset(folder: Path) -> StoredDataset:
    """The dataset in a folder. FailedPrecondition DATASET_CORRUPT for what is none."""
    try:
        words = json.loads((folder / _DESCRIPTION).read_text())
        if words["version"] != _VERSION:
            raise ValueError(f"version {words['version']} is not known here")
        stored = StoredDataset(
            info=decode_dataset(dataset_pb2.Dataset.FromString(base64.b64decode(words["dataset"]))),
            folder=folder,
            upload=words["upload"],
            fingerprint=bytes.fromhex(words["fingerprint"]),
            made_by=words["made_by"],
            body=bytes.fromhex(words["body"]),
        )
        there = stored.path.stat().st_size
        needed = max(
            (each.data.offset + each.nbytes for each in stored.tensors if isinstance(each.data, Segment)), default=0
        )
        if there < needed:
            raise ValueError(f"{_DATA} has {there} bytes, and should have {needed}")
    except (OSError, ValueError, KeyError, TypeError, GradwireError) as error:
        raise FailedPrecondition(f"{folder} holds no whole dataset: {error}", reason="DATASET_CORRUPT") from error
    return stored


def _tensors(batch: Batch) -> list[TensorData]:
    found = (leaf for part in (batch.inputs, batch.targets) for _, leaf in leaves(part))
    return [leaf for leaf in found if isinstance(leaf, TensorData)]


def _offsets(tensors: Sequence[TensorData]) -> list[int]:
    return list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))


def _copy(source: Segment, target: int) -> None:
    """By sendfile, inside the kernel."""
    offset, left = source.offset, source.nbytes
    file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while left:
            moved = os.sendfile(target, file, offset, left)
            if not moved:
                raise OSError(f"{source.path} is shorter than its tensors")
            offset, left = offset + moved, left - moved
    finally:
        os.close(file)
