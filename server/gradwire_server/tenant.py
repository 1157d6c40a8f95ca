"""Everything in the service that belongs to one owner: models, checkpoints, datasets, functions, tensors on their way.

Each owner has all of it apart, under names of their own: what is not in it does not exist for them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gradwire_server.admission import Admission
from gradwire_server.checkpoint_list import CheckpointList
from gradwire_server.config import ServerConfig
from gradwire_server.datasets import Datasets
from gradwire_server.fits import Fits
from gradwire_server.function_host import FunctionHost
from gradwire_server.hosting import Hosting
from gradwire_server.local.local_calls import LocalCalls
from gradwire_server.model_registry import ModelRegistry
from gradwire_server.model_storage import ModelStorage
from gradwire_server.read_calls import ReadCalls
from gradwire_server.replaying import Replayer
from gradwire_server.server_info import ServerFacts
from gradwire_server.servicer import Servicer
from gradwire_server.step_calls import StepCalls
from gradwire_server.tensors.held_bytes import HeldBytes
from gradwire_server.tensors.tensor_store import TensorStore
from gradwire_server.workers import Clusters


@dataclass(frozen=True, slots=True, kw_only=True)
class Premises:
    """What all owners share. `local_socket`: the path of the socket for clients on this machine, "" for none.

    models_but_of: how many models all other owners have.
    """

    clusters: Clusters
    config: ServerConfig
    admission: Admission
    held: HeldBytes
    local_socket: Callable[[], str]
    models_but_of: Callable[[Tenant], int]


class Tenant:
    """See the module. folder: private, in shared memory, and this owner's alone."""

    def __init__(self, owner: str, premises: Premises, storage: ModelStorage, folder: Path) -> None:
        self.owner = owner
        config, cluster = premises.config, premises.clusters.of(owner)
        limits = config.owner_limits
        self._storage = storage
        self.admission = Admission(limits.requests_in_flight, "owner_requests_in_flight", premises.admission)
        self.tensors = TensorStore(folder, limits, premises.held)
        hosting = Hosting(
            cluster=cluster,
            tensors=self.tensors,
            storage=storage,
            replayer=Replayer(),
            limits=limits,
            keeping=config.keeping,
            stored_replies=config.stored_replies,
            delete_seconds=config.delete_seconds,
            most_models=config.limits.models,
            models_elsewhere=lambda: premises.models_but_of(self),
        )
        self._models = ModelRegistry(hosting)
        self._functions = FunctionHost(cluster, self.tensors, limits, config.delete_seconds)
        self._checkpoints = CheckpointList(storage, self._models, config.stored_replies)
        self._datasets = Datasets(
            storage, self.tensors, durable=config.keeping.durability == "disk", stored_replies=config.stored_replies
        )
        self._fits = Fits(self._datasets)
        facts = ServerFacts(cluster, limits, premises.local_socket)
        parts = (
            self._models,
            self._checkpoints,
            self._functions,
            self._datasets,
            self._fits,
            self.tensors,
            facts,
        )
        self.servicer = Servicer(*parts, limits)
        # What was taken under former limits is taken once more.
        taken = replace(limits, tensor_bytes=sys.maxsize, graph_nodes=sys.maxsize, model_bytes=sys.maxsize)
        hosting.replayer.servicer = Servicer(*parts, taken)
        steps = StepCalls(self._models.get, limits, self.admission, config.stall_seconds)
        reads = ReadCalls(self._models.get, self.servicer.ComputeGradients, limits)
        self.own: Mapping[str, Callable[..., Any]] = {
            "TrainStep": steps.train_step,
            "TrainSteps": steps.train_steps,
            "ComputeGradients": reads.compute_gradients,
        }
        """Methods that take and give bytes in place of messages, by name, and parse for themselves."""
        small = {"TrainStep": steps.train_step}
        self.calls = LocalCalls(self.servicer, small, self.admission, limits.message_bytes)
        """Those of clients on this machine, past gRPC."""

    @property
    def models(self) -> int:
        """How many models it has."""
        return len(self._models)

    def open(self) -> None:
        """Find what is in the storage. Models come back meanwhile, and requests for one wait for it."""
        deletions = self._storage.deletions.open()
        self._datasets.open(deletions)
        self._checkpoints.open(deletions)
        self._models.open(deletions)

    def drain(self) -> None:
        """Have what lasts end soon, and what waits for ranks at once."""
        self._fits.drain()
        self._models.drain()

    async def idle(self) -> None:
        """Return when nothing runs that was begun, whoever waits for it."""
        await asyncio.gather(self._models.idle(), self._functions.idle())

    async def save_changed(self) -> None:
        """Take a checkpoint of every model that has changed since its newest one."""
        await self._models.save_changed()

    async def close(self) -> None:
        """Free ranks, remove files. What is in the storage stays."""
        await asyncio.gather(
            self._models.close(), self._checkpoints.close(), self._datasets.close(), self._functions.close()
        )
        self.tensors.close()
