"""The frontend process: builds every part, serves, drains. `python -m gradwire_server.main --help`: settings."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from contextlib import ExitStack
from pathlib import Path

from gradwire_proto.errors import GradwireError
from gradwire_server.config import ConfigError, ServerConfig, read_config
from gradwire_server.doors.exposure import check_exposure
from gradwire_server.freed_memory import return_freed_memory
from gradwire_server.private_folders import SHARED_MEMORY, private_folder
from gradwire_server.processes.service_folders import log_folder
from gradwire_server.service import Service
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.storages import Storages
from gradwire_server.temporary_checkpoints import remove_automatic_checkpoints
from gradwire_workers.cluster import Cluster, ClusterConfig

logger = logging.getLogger("gradwire_server")

LOCK_SECONDS = 10.0
"""How long another frontend that leaves the storage is waited for."""

CLOSE_SECONDS = 10.0
"""How long the end may take once nothing is waited for any more."""


def main() -> None:
    """Run the frontend until SIGTERM or SIGINT. Exit status 2: a setting is wrong; 1: it could not start or stop."""
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
    with ExitStack() as folders:
        runtime = folders.enter_context(private_folder("runtime_dir", config.runtime_dir))
        memory = folders.enter_context(private_folder("shared_memory_dir", config.shared_memory_dir, SHARED_MEMORY))
        # One that was named is the user's: who may read it is for them to say.
        place = config.storage or folders.enter_context(private_folder("storage", None))
        # First of all: from here on no other frontend changes what this one is about to read.
        lock = await asyncio.to_thread(StorageLock.take, place, LOCK_SECONDS)
        try:
            storages = Storages(lock, config.checkpoint_url)
            cluster = await Cluster.connect(_cluster_config(config, runtime, memory, place))
            # Again: Ray puts handlers of its own in place, which print a stack.
            _listen_for_signals(stop)
            try:
                await _serve(config, cluster, memory / "held", runtime, storages, stop)
            finally:
                await asyncio.wait_for(cluster.close(), CLOSE_SECONDS)
        finally:
            lock.release()
        if config.storage is None and config.checkpoint_url is not None:
            await asyncio.to_thread(remove_automatic_checkpoints, place, config.checkpoint_url, CLOSE_SECONDS)


async def _serve(
    config: ServerConfig,
    cluster: Cluster,
    held: Path,
    sockets: Path,
    storages: Storages,
    stop: asyncio.Queue[int],
) -> None:
    held.mkdir(mode=0o700, exist_ok=True)
    service = Service(cluster, held, config, storages, sockets)
    try:
        port = await service.start()
        # What is there by now stays: a collection need not go through the modules that Ray has brought.
        gc.freeze()
        host = config.listen.rpartition(":")[0]
        print(f"gradwire listening on {host}:{port}", flush=True)
        logger.info("stopping: %s", signal.Signals(await stop.get()).name)
        await _drain(service, config.drain_seconds, stop)
    finally:
        await asyncio.wait_for(service.close(), CLOSE_SECONDS)


async def _drain(service: Service, seconds: float, stop: asyncio.Queue[int]) -> None:
    """Let requests end, for so many seconds or until a second signal."""
    drain, hurry = asyncio.ensure_future(service.drain()), asyncio.ensure_future(stop.get())
    await asyncio.wait([drain, hurry], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logger.warning("requests were still running after draining; they are cut")
    for task in (drain, hurry):
        task.cancel()
    await asyncio.gather(drain, hurry, return_exceptions=True)


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
