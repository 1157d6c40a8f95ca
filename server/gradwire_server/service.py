"""The service as one thing: its parts put together, started, drained and closed."""

from __future__ import annotations

import asyncio
import secrets
import sys
from dataclasses import replace
from pathlib import Path

from gradwire_server.admission import Admission
from gradwire_server.checkpoint_list import CheckpointList
from gradwire_server.config import ServerConfig
from gradwire_server.datasets import Datasets
from gradwire_server.fits import Fits
from gradwire_server.function_host import FunctionHost
from gradwire_server.grpc_server import GrpcServer
from gradwire_server.hosting import Hosting
from gradwire_server.local.local_calls import LocalCalls
from gradwire_server.local.local_socket import SOCKET_PREFIX, LocalSocket
from gradwire_server.model_registry import ModelRegistry
from gradwire_server.model_storage import ModelStorage
from gradwire_server.read_calls import ReadCalls
from gradwire_server.replaying import Replayer
from gradwire_server.rpc_handlers import generic_handler
from gradwire_server.server_info import ServerFacts
from gradwire_server.servicer import Servicer
from gradwire_server.step_calls import StepCalls
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.workers import Cluster


class Service:
    """Everything between the socket and the ranks. `folder` is private, in shared memory, and the service's alone.

    sockets: a private folder for the socket over which clients share memory; None: they do not.
    """

    def __init__(
        self, cluster: Cluster, folder: Path, config: ServerConfig, storage: ModelStorage, sockets: Path | None = None
    ) -> None:
        limits = config.limits
        self._listen = config.listen
        self._admission = Admission(limits.requests_in_flight)
        self._tensors = TensorStore(folder, limits)
        hosting = Hosting(
            cluster=cluster,
            tensors=self._tensors,
            storage=storage,
            replayer=Replayer(),
            limits=limits,
            keeping=config.keeping,
            stored_replies=config.stored_replies,
            delete_seconds=config.delete_seconds,
        )
        self._models = ModelRegistry(hosting)
        self._functions = FunctionHost(cluster, self._tensors, limits, config.delete_seconds)
        self._local: LocalSocket | None = None
        facts = ServerFacts(cluster, limits, lambda: self._local.path if self._local else "")
        self._storage = storage
        self._checkpoints = checkpoints = CheckpointList(storage, self._models, config.stored_replies)
        self._datasets = Datasets(
            storage,
            self._tensors,
            durable=config.keeping.durability == "disk",
            stored_replies=config.stored_replies,
        )
        self._fits = Fits(self._datasets)
        parts = (self._models, checkpoints, self._functions, self._datasets, self._fits, self._tensors, facts)
        servicer = Servicer(*parts, limits)
        # What was taken under former limits is taken once more.
        taken = replace(limits, tensor_bytes=sys.maxsize, graph_nodes=sys.maxsize, model_bytes=sys.maxsize)
        hosting.replayer.servicer = Servicer(*parts, taken)
        steps = StepCalls(self._models.get, limits, self._admission, config.stall_seconds)
        if sockets is not None and config.shares_memory:
            path = sockets / f"{SOCKET_PREFIX}{secrets.token_hex(8)}.sock"
            calls = LocalCalls(servicer, {"TrainStep": steps.train_step}, self._admission, limits.message_bytes)
            self._local = LocalSocket(path, self._tensors, limits, calls)
        reads = ReadCalls(self._models.get, servicer.ComputeGradients, limits)
        own = {
            "TrainStep": steps.train_step,
            "TrainSteps": steps.train_steps,
            "ComputeGradients": reads.compute_gradients,
        }
        handler = generic_handler(servicer, self._admission, limits.message_bytes, config.stall_seconds, own)
        self._server = GrpcServer(handler, limits.message_bytes)

    async def start(self) -> int:
        """Serve; returns the port. Models of the storage come back meanwhile. Raises Unavailable ADDRESS_IN_USE."""
        deletions = self._storage.deletions.open()
        self._datasets.open(deletions)
        self._checkpoints.open(deletions)
        self._models.open(deletions)
        if self._local is not None:
            self._local.start()
        return await self._server.start(self._listen)

    async def drain(self) -> None:
        """Take no new requests, and return when all that came before have ended."""
        await self._server.announce_stop()
        self._admission.drain()
        self._fits.drain()
        await self._admission.idle()
        # Work goes on without callers: a command that was begun ends.
        await asyncio.gather(self._models.idle(), self._functions.idle())

    async def close(self) -> None:
        """End everything: cut requests, free ranks, remove files. What is in the storage stays."""
        await self._server.stop(0)
        if self._local is not None:
            self._local.close()
        await asyncio.gather(
            self._models.close(), self._checkpoints.close(), self._datasets.close(), self._functions.close()
        )
        self._tensors.close()
