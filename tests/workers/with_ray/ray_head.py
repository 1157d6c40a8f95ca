"""A Ray of its own for the tests: prints its address, and ends when its standard input does."""

from __future__ import annotations

import sys

import ray

# Idle workers that Ray starts by itself would only compete with the ranks for the machine.
QUIET = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}

if __name__ == "__main__":
    context = ray.init(
        address="local",
        num_cpus=8,
        num_gpus=int(sys.argv[2]),
        include_dashboard=False,
        object_store_memory=80 << 20,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=sys.argv[1],
        _system_config=QUIET,
    )
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
