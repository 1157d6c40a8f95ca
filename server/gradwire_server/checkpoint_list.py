"""The checkpoints of a service, as clients find, list and delete them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.names import checkpoint_name
from gradwire_proto.values import Checkpoint
from gradwire_server.calls import Call
from gradwire_server.deletions import Deletion, Deletions
from gradwire_server.model_storage import ModelStorage
from gradwire_server.pages import page_of
from gradwire_server.request_log import RequestLog
from gradwire_server.storage.checkpoint_store import key_of
from gradwire_server.storage.saved_model import StoredReply
from gradwire_server.tensors.file_threads import in_thread


class Needed(Protocol):
    """Who knows which checkpoints models are brought back from."""

    def needs_checkpoint(self, model_id: str, number: int) -> bool: ...


class CheckpointList:
    """See the module. Names are `Checkpoint.name`."""

    def __init__(self, storage: ModelStorage, models: Needed, stored_replies: int) -> None:
        self._store = storage.checkpoints
        self._models = models
        seen: RequestLog[Deletion] = RequestLog(stored_replies, 0)
        self._deletions = Deletions("DeleteCheckpoint", seen, storage.deletions)

    def open(self, deletions: Iterable[StoredReply]) -> None:
        """These requests, among others, were answered by an earlier process of the service."""
        self._deletions.restore(deletions)

    async def close(self) -> None:
        """Wait for what is being deleted."""
        await self._deletions.close()

    async def get(self, name: str) -> Checkpoint:
        """What is known of a checkpoint. Raises CheckpointNotFound."""
        return await in_thread(self._store.get, key_of(name), threads=self._store.threads)

    async def page(self, size: int, token: str) -> tuple[list[Checkpoint], str]:
        """(checkpoints by name, automatic ones last, the next page's token or ""). `size` 0: as many as is good."""
        found = await in_thread(self._store.list, threads=self._store.threads)
        return page_of({_order(each): each for each in found}, size, token)

    async def delete(self, name: str, call: Call) -> None:
        """Delete a checkpoint. A repeat of a request id leaves alone what was saved since.

        Raises CheckpointNotFound; FailedPrecondition CHECKPOINT_NEEDED for one that its model is brought back from.
        """
        if await self._deletions.is_repeated(call):
            return
        model_id, separator, number = name.partition("/")
        if separator and self._models.needs_checkpoint(model_id, int(number)):
            raise FailedPrecondition(
                f"models/{model_id} is brought back from this checkpoint: it goes with the model, or when a newer one"
                " has taken its place",
                reason="CHECKPOINT_NEEDED",
                resource=checkpoint_name(name),
            )

        async def delete() -> None:
            await in_thread(self._store.delete, key_of(name), threads=self._store.threads)

        await self._deletions.run(name, delete, call)


def _order(checkpoint: Checkpoint) -> str:
    if not checkpoint.automatic:
        return f"0/{checkpoint.name}"
    return f"1/{checkpoint.model_id}/{checkpoint.command:018d}"
