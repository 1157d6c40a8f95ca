"""The connections between the ranks of one model, and the collectives over them.

Built on torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors. Ranks find each other through a file in a
private folder and talk over the loopback interface. What torch lacks is added here: a collective fails at once when
a peer gives up, instead of waiting for its timeout, and the same processes can then join again in a new generation.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore
from torch.futures import Future

from gradwire_proto.errors import InternalError
from gradwire_workers.training.peer_connections import PeerConnections

COLLECTIVE_SECONDS = 1800.0
"""How long a collective waits for a peer that is alive but slow. A peer that gives up or dies is noticed at once."""


def peer_failed(cause: object = "") -> InternalError:
    """The error of a rank that could not go on because another rank did not. Never the root cause."""
    return InternalError(f"another rank of the model failed ({cause})", reason="PEER_FAILED")


class ProcessGroups:
    """This process's place among the ranks of one model.

    One group of torch's for everything: an idle group of gloo's wakes up a hundred times a second, and as all ranks run
    the same graph, batch norm's collectives and DDP's come in the same order everywhere. A process has at most one
    ProcessGroups at a time. Every method but `abort` belongs to one thread.
    """

    def __init__(
        self, *, folder: Path, generation: int, rank: int, size: int, device: str, join_seconds: float
    ) -> None:
        self.folder, self.generation, self.rank, self.size, self.device = folder, generation, rank, size, device
        self.seconds = 0.0  # spent waiting in collectives, ever
        self._join_seconds = join_seconds
        self._lock = threading.Lock()
        self._pending: set[Future] = set()
        self._cause: object = None
        # gloo binds to this interface and no other: ranks of one node need no network.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self._groups: list[Any] = []
        try:
            self._connect(timedelta(seconds=join_seconds))
        except Exception as error:
            if dist.is_initialized():
                dist.destroy_process_group()
            raise peer_failed(f"it did not join: {error}") from error

    def _connect(self, timeout: timedelta) -> None:
        store = FileStore(str(self.folder / f"generation-{self.generation}"), self.size)
        store.set_timeout(timeout)
        backend = "cpu:gloo,cuda:nccl" if self.device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)
        groups: list[Any] = [dist.group.WORLD]
        groups[0].set_timeout(timedelta(seconds=COLLECTIVE_SECONDS))
        self._connections = PeerConnections(store, rank=self.rank, size=self.size, on_closed=self.abort)
        self._groups = groups
        self._connections.watch()

    @classmethod
    def join(
        cls, *, folder: str | Path, generation: int, rank: int, size: int, device: str = "cpu", timeout: float = 60.0
    ) -> ProcessGroups:
        """Wait until all `size` ranks have joined, `timeout` seconds at most, about 30 ms when all are there.

        `folder` is private to the model and the same for all its ranks; every join of a model has a new `generation`.
        Raises InternalError PEER_FAILED when some rank does not come.
        """
        return cls(
            folder=Path(folder), generation=generation, rank=rank, size=size, device=device, join_seconds=timeout
        )

    def rejoin(self, generation: int) -> ProcessGroups:
        """Leave, and join the same ranks again."""
        self.leave()
        return type(self)(
            folder=self.folder,
            generation=generation,
            rank=self.rank,
            size=self.size,
            device=self.device,
            join_seconds=self._join_seconds,
        )

    @property
    def main(self) -> Any:
        """torch's process group."""
        return self._groups[0]

    @property
    def failed(self) -> bool:
        """Whether this rank or a peer has aborted: no collective works any more, until all rejoin."""
        return self._cause is not None

    def abort(self, cause: object = "aborted") -> None:
        """Make every collective fail, here and on all peers, at once. From any thread; repeating it does nothing."""
        with self._lock:
            if self._cause is not None:
                return
            self._cause = str(cause)
            pending, self._pending = self._pending, set()
        self._connections.close()
        for future in pending:
            future.set_exception(peer_failed(self._cause))
        if self.device.startswith("cuda"):
            for group in self._groups:
                group.abort()

    def leave(self) -> None:
        """Abort, and give the process back the state in which it can join anew. Drop what uses the groups first.

        May be repeated.
        """
        if not self._groups:
            return
        self.abort("left")
        dist.destroy_process_group()
        groups, self._groups = self._groups, []
        threading.Thread(target=_release, args=(groups,), daemon=True, name="gradwire-release").start()

    # --- collectives: tensors stay where they are; every rank calls the same ones in the same order -----------------

    def start_all_reduce(self, tensor: torch.Tensor, *, largest: bool = False) -> Future:
        """Begin to sum `tensor` over all ranks, in place; or to take the largest, element by element."""
        operation = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
        return self._track(lambda: dist.all_reduce(tensor, operation, self.main, async_op=True), tensor)

    def all_reduce(self, tensor: torch.Tensor, *, largest: bool = False) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place; or take the largest, element by element."""
        return self.wait(self.start_all_reduce(tensor, largest=largest))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's `tensor`, all of one shape, stacked: [size, *shape]."""
        result = tensor.new_empty((self.size, *tensor.shape))
        parts = list(result.unbind(0))
        return self.wait(self._track(lambda: dist.all_gather(parts, tensor, self.main, async_op=True), result))

    def broadcast(self, tensor: torch.Tensor, *, source: int = 0) -> torch.Tensor:
        """Fill `tensor` with rank `source`'s."""
        return self.wait(self._track(lambda: dist.broadcast(tensor, source, self.main, async_op=True), tensor))

    def wait(self, future: Future) -> torch.Tensor:
        """The collective's result. InternalError PEER_FAILED when a peer gave up."""
        began = perf_counter()
        try:
            return future.wait()
        except InternalError as error:
            # The future holds its error, whose traceback would hold the future, and every frame here with its groups:
            # no collector sees a circle through torch, and gloo's threads would never end.
            error.__traceback__ = None
            raise InternalError(error.message, reason=error.reason) from None
        except RuntimeError as error:
            raise peer_failed(error) from error
        finally:
            self.seconds += perf_counter() - began

    def _track(self, start, result: torch.Tensor) -> Future:
        """A future of `result` that `abort` can fail.

        gloo's own wait is no use for that: a send that meets a closed connection may go unnoticed until its timeout.
        NCCL's is: `abort` ends it.
        """
        if result.is_cuda:
            return start().get_future().then(lambda _: result)
        future = Future()
        with self._lock:
            if self._cause is not None:
                raise peer_failed(self._cause)
            self._pending.add(future)

        def finish(done: Future) -> None:
            with self._lock:
                if future not in self._pending:
                    return
                self._pending.remove(future)
            try:
                done.value()
            except RuntimeError as error:
                self.abort(error)
                future.set_exception(peer_failed(error))
            else:
                future.set_result(result)

        try:
            start().get_future().add_done_callback(finish)
        except RuntimeError as error:
            self.abort(error)
            raise peer_failed(error) from error
        return future


def _release(groups: list) -> None:
    """Drop the last references to groups where nobody waits for it.

    A thread of gloo may still wait in a collective, not having noticed that the connection was closed, and a group's
    destructor waits for its threads.
    """
    sleep(1.0)  # until the thread that left has let go of every reference of its own, such as a traceback's
    groups.clear()
