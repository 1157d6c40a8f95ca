"""What the service says of itself."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from gradwire_proto.values import Limits, ServerInfo
from gradwire_server.workers import Cluster


class ServerFacts:
    """Versions and limits, which stay, and capacity, which does not."""

    def __init__(self, cluster: Cluster, limits: Limits, local_socket: Callable[[], str] = lambda: "") -> None:
        self._cluster = cluster
        self._local_socket = local_socket
        self._limits = limits
        self._version = version("gradwire")
        # From the installed package's metadata: importing torch would take seconds and memory.
        self._torch_version = version("torch")

    def info(self) -> ServerInfo:
        """The service as it is now."""
        capacity = self._cluster.capacity
        return ServerInfo(
            version=self._version,
            torch_version=self._torch_version,
            workers=capacity.workers,
            free_workers=capacity.free_workers,
            gpus=capacity.gpus,
            limits=self._limits,
            local_socket=self._local_socket(),
        )
