"""The frontend process: builds every part, serves, drains. `python -m gradwire_server.main --help`: settings."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from gradwire_proto.errors import GradwireError
from gradwire_server.config import ConfigError, ServerConfig, read_config
from gradwire_server.doors.exposure import check_exposure
from gradwire_server.freed_memory import return_freed_memory
from gradwire_server.health.health_service import Health, HealthPort
from gradwire_server.health.part_watch import PartWatch
from gradwire_server.health.readiness import RAY, STORAGE, Readiness
from gradwire_server.private_folders import SHARED_MEMORY, private_folder
from gradwire_server.processes.service_folders import log_folder
from gradwire_server.service import Service, keys
from gradwire_server.stopping import Grace, stop_in_order
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.storages import Storages
from gradwire_server.temporary_checkpoints import remove_automatic_checkpoints
from gradwire_workers.cluster import Cluster, ClusterConfig

T = TypeVar("T")

logger = logging.getLogger("gradwire_server")

LOCK_SECONDS = 10.0
"""How long another frontend that leaves the storage is waited for."""

CLOSE_SECONDS = 10.0
"""How long the end may take once nothing is waited for any more."""


def main() -> None:
    """Run the frontend until SIGTERM or SIGINT. Exit status 0: it has stopped, and what it had answered is kept;
    2: a setting is wrong; 1: it could not start, or its end was cut short.
    """
    try:
        config = read_config(sys.argv[1:], "python -m gradwire_server.main")
        check_exposure(config)
        return_freed_memory()
        _start_log(config)
        asyncio.run(run(config))
    except ConfigError as error:
        sys.exit(_complain(error, 2))
    except GradwireError as error:
        sys.exit(_complain(error, 1))
    except TimeoutError:
        sys.exit(_complain(f"the end took more than {CLOSE_SECONDS:g} s and was cut short", 1))


def _start_log(config: ServerConfig) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if config.storage:
        handlers.append(logging.FileHandler(log_folder(config.storage) / "frontend.log"))
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=config.log_level.upper(), format=form, handlers=handlers)


def _complain(error: Exception | str, status: int) -> int:
    print(f"gradwire: {error}", file=sys.stderr)
    return status


async def run(config: ServerConfig) -> None:
    """Serve until a signal comes, then drain and clean up."""
    stop: asyncio.Queue[int] = asyncio.Queue()
    _listen_for_signals(stop)
    health = Health(Readiness({RAY: "it is not joined yet", STORAGE: "it is not open yet"}))
    if config.health_listen is None:
        await _run(config, health, stop)
        return
    # First and last of all: the process lives, though it does not serve yet, or any more.
    port = HealthPort(health)
    await port.start(config.health_listen)
    try:
        await _run(config, health, stop)
    finally:
        await port.stop()


async def _run(config: ServerConfig, health: Health, stop: asyncio.Queue[int]) -> None:
    grace = Grace(config.grace)
    # Before anything is touched: whoever has mistyped a file hears so at once.
    keys(config)
    with ExitStack() as folders:
        runtime = folders.enter_context(private_folder("runtime_dir", config.runtime_dir))
        memory = folders.enter_context(private_folder("shared_memory_dir", config.shared_memory_dir, SHARED_MEMORY))
        # One that was named is the user's: who may read it is for them to say.
        place = config.storage or folders.enter_context(private_folder("storage", None))
        # Before Ray is joined: from here on no other frontend changes what this one is about to read.
        lock = await asyncio.to_thread(StorageLock.take, place, LOCK_SECONDS)
        try:
            storages = Storages(lock, config.checkpoint_url)
            joining = Cluster.connect(_cluster_config(config, runtime, memory, place))
            if (cluster := await _unless_stopped(joining, stop)) is None:
                return
            # Again: Ray puts handlers of its own in place, which print a stack.
            _listen_for_signals(stop)
            try:
                (memory / "held").mkdir(mode=0o700, exist_ok=True)
                service = Service(cluster, memory / "held", config, storages, runtime, health)
                watches = (
                    PartWatch(health.readiness, RAY, cluster.check, f"Ray at {config.ray_address} does not answer"),
                    PartWatch(health.readiness, STORAGE, storages.check, f"the storage {place} does not answer"),
                )
                await _serve(config, service, watches, grace, stop)
            finally:
                await asyncio.wait_for(cluster.close(), grace.closing(CLOSE_SECONDS))
        finally:
            lock.release()
        if config.storage is None and config.checkpoint_url is not None:
            await asyncio.to_thread(remove_automatic_checkpoints, place, config.checkpoint_url, CLOSE_SECONDS)


async def _unless_stopped(work: Coroutine[Any, Any, T], stop: asyncio.Queue[int]) -> T | None:
    """What `work` gives; None where a signal came before."""
    working, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop.get())
    await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        stopped.cancel()
        return working.result()
    working.cancel()
    await asyncio.wait([working])
    return None


async def _serve(
    config: ServerConfig, service: Service, watches: Sequence[PartWatch], grace: Grace, stop: asyncio.Queue[int]
) -> None:
    try:
        port = await service.start()
        # What is there by now stays: a collection need not go through the modules that Ray has brought.
        gc.freeze()
        for watch in watches:
            watch.start()
        host = config.listen.rpartition(":")[0]
        print(f"gradwire listening on {host}:{port}", flush=True)
        logger.info("stopping: %s", signal.Signals(await stop.get()).name)
        # A temporary storage goes with the service.
        saves = config.checkpoint_at_stop and config.storage is not None
        await stop_in_order(service, grace, stop.get(), drain_seconds=config.drain_seconds, saves=saves)
    finally:
        for watch in watches:
            watch.stop()
        await asyncio.wait_for(service.close(), grace.closing(CLOSE_SECONDS))


def _listen_for_signals(received: asyncio.Queue[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, received.put_nowait, number)


def _cluster_config(config: ServerConfig, runtime: Path, memory: Path, place: Path) -> ClusterConfig:
    if config.ray_address is None:
        # Never guessed: ray.init() without an address joins any cluster that it finds.
        raise ConfigError("ray_address: needed here; `gradwire serve` without it starts a Ray of its own")
    return ClusterConfig(
        address=config.ray_address,
        namespace=config.ray_namespace,
        folder=str(runtime),
        memory_folder=str(memory),
        workers=config.workers,
        spare_ranks=config.spare_ranks,
        threads_per_rank=config.threads_per_rank,
        limits=config.limits,
        weights_folder=None if config.weights_folder is None else str(config.weights_folder),
        # There after a restart: a model that comes back need not wait for a compiler.
        kernels_folder=str(place.absolute() / "kernels"),
        workers_per_owner=config.owner_workers,
    )


if __name__ == "__main__":
    main()
