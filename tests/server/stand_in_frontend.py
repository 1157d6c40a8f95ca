"""Stands in for the frontend: listens, says so, drains on SIGTERM. With STAND_IN_RANKS=N it holds N actors in Ray.

It takes the flags that the supervisor gives the real one, and leaves a trace of its life in $STAND_IN_TRACE.
"""

import argparse
import os
import signal
import socket
from pathlib import Path
from typing import Any

from gradwire_server.config import add_flags, config_from_flags
from gradwire_server.processes.ray_head import ADDRESS_FILE_VARIABLE, wait_for_address


def main() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    config = config_from_flags(parser.parse_args())
    trace("started")
    address = wait_for_address(Path(os.environ[ADDRESS_FILE_VARIABLE]))
    ranks = start_ranks(address, int(os.environ.get("STAND_IN_RANKS", "0")))
    assert config.shared_memory_dir
    (config.shared_memory_dir / "tensors").write_bytes(b"left behind")
    assert config.storage
    with open(config.storage / "journal", "a") as journal:
        journal.write("x")
    trace(f"journal-{(config.storage / 'journal').stat().st_size}")
    host, _, port = config.listen.rpartition(":")
    listener = socket.create_server((host, int(port)))
    signal.signal(signal.SIGTERM, lambda *_: drain())
    trace("ready")
    print(f"gradwire listening on {host}:{listener.getsockname()[1]}", flush=True)
    while ranks is not None:
        signal.pause()


def start_ranks(address: str, count: int) -> list[Any]:
    if count == 0:
        return []
    import ray

    ray.init(address=address, namespace="stand-in", log_to_driver=False, configure_logging=False)

    class Rank:
        def pid(self) -> int:
            return os.getpid()

    rank_actor: Any = ray.remote(Rank)
    ranks = [
        # Those of one that was killed are there yet.
        rank_actor.options(name=f"rank-{index}", num_cpus=0, lifetime="detached", get_if_exists=True).remote()
        for index in range(count)
    ]
    for pid in ray.get([rank.pid.remote() for rank in ranks]):
        trace(f"rank {pid}")
    return ranks


def drain() -> None:
    trace("drained")
    raise SystemExit(0)


def trace(what: str) -> None:
    with open(os.environ["STAND_IN_TRACE"], "a") as file:
        file.write(f"{os.getpid()} {what}\n")


if __name__ == "__main__":
    main()
