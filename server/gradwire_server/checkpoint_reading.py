"""Checkpoints read for models that are made of them. The files of what is read are the caller's."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from gradwire_proto.errors import FailedPrecondition, GradwireError
from gradwire_proto.names import automatic_checkpoint
from gradwire_server.current_spec import CurrentSpec
from gradwire_server.failures import may_pass
from gradwire_server.storage.checkpoint_store import CheckpointStore, key_of
from gradwire_server.storage.saved_model import SavedModel
from gradwire_server.tensors.file_threads import in_thread

logger = logging.getLogger(__name__)


async def read_newest(store: CheckpointStore, model_id: str) -> tuple[SavedModel, CurrentSpec]:
    """The newest automatic checkpoint of a model that is whole: the journal goes back to the one before."""
    return await in_thread(_newest, store, model_id, threads=store.threads, unwanted=_remove)


async def read_checkpoint(store: CheckpointStore, name: str, workers: int | None) -> tuple[SavedModel, CurrentSpec]:
    """A checkpoint for a new model of so many ranks; None: as many as it had."""
    return await in_thread(_named, store, name, workers, threads=store.threads, unwanted=_remove)


def _newest(store: CheckpointStore, model_id: str) -> tuple[SavedModel, CurrentSpec]:
    first: GradwireError | None = None
    for number in store.automatic(model_id):
        try:
            return _decoded(store.read(key_of(automatic_checkpoint(model_id, number))))
        except FailedPrecondition as error:
            if may_pass(error):
                raise
            logger.error("%s", error)
            first = first or error
    raise first or FailedPrecondition("it has no checkpoint", reason="CHECKPOINT_CORRUPT")


def _named(store: CheckpointStore, name: str, workers: int | None) -> tuple[SavedModel, CurrentSpec]:
    saved, spec = _decoded(store.read(key_of(name)))
    value = spec.value if workers is None else replace(spec.value, workers=workers)
    return saved, CurrentSpec(value, time.time())


def _decoded(saved: SavedModel) -> tuple[SavedModel, CurrentSpec]:
    try:
        return saved, CurrentSpec.decode(saved.spec)
    except BaseException:
        saved.remove_files()
        raise


def _remove(read: tuple[SavedModel, CurrentSpec]) -> None:
    read[0].remove_files()
