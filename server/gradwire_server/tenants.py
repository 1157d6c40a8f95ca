"""The owners of the service, each with what is theirs: made when one comes for the first time, or is in the storage."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from gradwire_proto.token_file import DEFAULT_OWNER
from gradwire_server.admission import Admission
from gradwire_server.config import ServerConfig
from gradwire_server.storages import Storages
from gradwire_server.tenant import Premises, Tenant
from gradwire_server.tensors.held_bytes import HeldBytes
from gradwire_server.workers import Clusters

_FOLDERS = "owners"


class Tenants:
    """See the module. `folder`: private, in shared memory, and the service's alone."""

    def __init__(self, clusters: Clusters, folder: Path, config: ServerConfig, storages: Storages) -> None:
        self.local_socket = ""
        """The path of the socket for clients on this machine; "" for none."""
        self.admission = Admission(config.limits.requests_in_flight, "requests_in_flight")
        self._folder = folder
        self._storages = storages
        self._premises = Premises(
            clusters=clusters,
            config=config,
            admission=self.admission,
            held=HeldBytes(config.limits.held_bytes, "held_bytes"),
            local_socket=lambda: self.local_socket,
            models_but_of=lambda tenant: sum(each.models for each in self._tenants.values() if each is not tenant),
        )
        self._tenants: dict[str, Tenant] = {}

    def open(self) -> None:
        """Find all that the storage has."""
        # What a frontend that was killed left behind has no owner any more.
        shutil.rmtree(self._folder / _FOLDERS, ignore_errors=True)
        for owner in self._storages.owners():
            self.of(owner)

    def of(self, owner: str) -> Tenant:
        """What belongs to this owner."""
        tenant = self._tenants.get(owner)
        if tenant is None:
            tenant = Tenant(owner, self._premises, self._storages.of(owner), self._folder_of(owner))
            tenant.open()
            self._tenants[owner] = tenant
        return tenant

    def _folder_of(self, owner: str) -> Path:
        if owner == DEFAULT_OWNER:
            return self._folder
        folder = self._folder / _FOLDERS / owner
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def drain(self) -> None:
        """Take no new requests."""
        self.admission.drain()
        for tenant in self._tenants.values():
            tenant.drain()

    async def idle(self) -> None:
        """Return when all that came has ended."""
        await self.admission.idle()
        # Work goes on without callers: a command that was begun ends.
        await asyncio.gather(*(tenant.idle() for tenant in self._tenants.values()))

    async def save_changed(self) -> None:
        """Take a checkpoint of every model that has changed since its newest one."""
        await asyncio.gather(*(tenant.save_changed() for tenant in self._tenants.values()))

    async def close(self) -> None:
        """End everything. What is in the storage stays."""
        await asyncio.gather(*(tenant.close() for tenant in self._tenants.values()))
