"""`gradwire.launch()`: a service of one's own, and a client of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from gradwire.embedded_service import EmbeddedService

if TYPE_CHECKING:
    from gradwire.client import Client


def launch(
    workers: int = 2, storage: str | os.PathLike[str] | None = None, *, timeout: float = 60.0, **server_options: Any
) -> Client:
    """A client of an embedded service: a local Ray and a frontend on a free loopback port.

    The service ends with the client (`close()` or the end of its `with` block) or with this process, even by SIGKILL;
    its processes and temporary files are gone within seconds.

    workers: how many ranks the service can host, all models together. storage: the folder of the service; None is a
    temporary one, removed at the end. timeout: seconds until the service must be ready. server_options: settings of
    the server by name, such as `spare_ranks=4` or `log_level="debug"`; see `gradwire serve --help`.

    Raises FailedPrecondition (SERVER_NOT_INSTALLED) without the extra `gradwire[server]`, InvalidArgument for wrong
    options, and Unavailable (LAUNCH_FAILED) with the end of the service's log when it does not come up.
    """
    service = EmbeddedService(workers, storage, server_options)
    try:
        # While the service starts: this imports torch, which takes seconds.
        from gradwire.client import connect

        client = connect(service.wait(timeout), timeout=timeout)
    except BaseException:
        service.stop()
        raise
    client.on_close(service.stop)
    return client
