"""A checkpointer with a model and a store that remember what they were asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from gradwire_proto.errors import (
    AlreadyExists,
    CheckpointNotFound,
)
from gradwire_proto.values import Checkpoint, ModelState, Segment, TensorData
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.storage.saved_model import SavedModel

REQUEST = "00000000-0000-4000-8000-000000000001"
OTHER_REQUEST = "00000000-0000-4000-8000-000000000002"


class Journal:
    """A hundred bytes a command."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cuts: list[int] = []

    def size_after(self, number: int) -> int:
        return 100 * (self._model.number - max(number, 0))

    def cut(self, number: int) -> Callable[[], None]:
        def remove() -> None:
            assert threading.current_thread() is not threading.main_thread(), "it may take long"
            self.cuts.append(number)

        return remove


class Model:
    """A model whose state is its number. `turn`: held, nothing gets its turn."""

    model_id = "digits"

    def __init__(self, folder: Path) -> None:
        self.number = 0
        self.retains = False
        self.journal: Journal | None = Journal(self)
        self.folder = folder
        self.turn = asyncio.Event()
        self.turn.set()
        self.captures: list[bool] = []

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        number = self.number  # The turn is that of the call.
        self.captures.append(automatic)

        async def work() -> SavedModel | None:
            await self.turn.wait()
            if automatic and self.retains:
                return None
            path = self.folder / f"segment-{len(self.captures)}"
            path.write_bytes(bytes(4))
            tensors = {"w": TensorData("float32", (1,), Segment(str(path), 0, 4))}
            return saved(number, tensors)

        return work()


def saved(number: int, tensors: dict[str, TensorData]) -> SavedModel:
    state = ModelState(
        tensors=tensors,
        optimizer=None,
        step=number,
        command=number,
        trained=("w",),
        held=(None,),
        splits={},
        opened=(),
        threads=1,
    )
    return SavedModel(
        name="",
        model_id="digits",
        automatic=True,
        created_at=0.0,
        request_id=None,
        spec=b"",
        layout=(),
        workers=1,
        state=state,
    )


class Store:
    """Checkpoints by key. `gate` cleared holds writers; `error` is what they raise."""

    def __init__(self) -> None:
        self.held: dict[str, SavedModel] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.delete_error: Exception | None = None
        self.log: list[str] = []
        self.writers = self.most_writers = 0

    def write(self, key: str, saved: SavedModel) -> Checkpoint:
        self.writers += 1
        self.most_writers = max(self.most_writers, self.writers)
        try:
            assert self.gate.wait(10)
            if self.error is not None:
                raise self.error
            first = self.held.get(key)
            if first is not None and not saved.automatic:
                if first.request_id is None or first.request_id != saved.request_id:
                    raise AlreadyExists("taken", reason="CHECKPOINT_EXISTS")
                return first.checkpoint(4)
            assert all(Path(tensor.data.path).exists() for tensor in saved.state.tensors.values())  # pyright: ignore
            self.held[key] = saved
            self.log.append(f"write {key}")
            return saved.checkpoint(4)
        finally:
            self.writers -= 1

    def delete(self, key: str) -> None:
        if self.delete_error is not None:
            raise self.delete_error
        if key not in self.held:
            raise CheckpointNotFound("gone")
        del self.held[key]
        self.log.append(f"delete {key}")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A checkpointer and what it works on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Model(folder)
        self.store = Store()
        self.clock = Clock()

    def checkpointer(self, kept: tuple[int, ...] = (0,), **policy: Any) -> Checkpointer:
        limits = {"commands": 10**6, "journal_bytes": 10**9, "seconds": 10**6, "keep": 2} | policy
        for number in kept:
            self.store.held[f"auto/digits/{number}"] = saved(number, {})
        return Checkpointer(self.model, self.store, CheckpointPolicy(**limits), kept, clock=self.clock)

    async def run(self, checkpointer: Checkpointer, commands: int) -> None:
        for _ in range(commands):
            self.model.number += 1
            checkpointer.applied()
            await asyncio.sleep(0)

    @property
    def keys(self) -> list[str]:
        return sorted(self.store.held)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


async def settled() -> None:
    """Time enough for what must not happen."""
    await asyncio.sleep(0.1)
