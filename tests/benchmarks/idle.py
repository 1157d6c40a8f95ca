"""Idle cost: the service with four models of two ranks each, against bare Ray with as many idle actors, in one run.

Prints CPU seconds per second (in percent of one core) of both process trees and their difference.
The bar: at most 2% of one core more than bare Ray.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import psutil
import torch
from torch import nn

import gradwire
from gradwire import optim

BARE_RAY = """
import sys, time, ray
ray.init(address="local", num_cpus=int(sys.argv[1]), include_dashboard=False, _temp_dir=sys.argv[2],
         log_to_driver=False, object_store_memory=128 << 20)
@ray.remote(num_cpus=1)
class Idle:
    def ready(self):
        import torch
        return True
actors = [Idle.remote() for _ in range(int(sys.argv[1]))]
ray.get([actor.ready.remote() for actor in actors])
print("ready", flush=True)
sys.stdin.readline()
ray.shutdown()
"""


def descendants_of_this_process(but: int | None) -> list[psutil.Process]:
    """The process trees under this one, without the tree of `but`."""
    roots = [child for child in psutil.Process().children() if child.pid != but]
    return [process for root in roots for process in [root, *root.children(recursive=True)]]


def rate(processes: list[psutil.Process], seconds: float) -> float:
    """CPU seconds per second of these processes while nothing is asked of them."""

    def used() -> float:
        total = 0.0
        for process in processes:
            try:
                times = process.cpu_times()
                total += times.user + times.system
            except psutil.NoSuchProcess:
                pass
        return total

    before, start = used(), time.monotonic()
    time.sleep(seconds)
    return (used() - before) / (time.monotonic() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of one window")
    parser.add_argument("--rounds", type=int, default=3, help="windows of each kind, interleaved")
    arguments = parser.parse_args()
    ranks = 8
    with tempfile.TemporaryDirectory(prefix="gwb-") as folder:
        bare = subprocess.Popen(
            [sys.executable, "-c", BARE_RAY, str(ranks), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        )
        assert bare.stdin and bare.stdout
        while (line := bare.stdout.readline()) and "ready" not in line:
            pass
        try:
            with gradwire.launch(workers=ranks) as client:
                example = (torch.randn(8, 4), torch.randn(8, 2))
                models = [
                    client.create_model(
                        nn.Linear(4, 2), loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=example, workers=2
                    )
                    for _ in range(4)
                ]
                for model in models:
                    model.train_step(*example)
                time.sleep(10)  # the warm pool refills
                ours = descendants_of_this_process(but=bare.pid)
                theirs = [psutil.Process(bare.pid), *psutil.Process(bare.pid).children(recursive=True)]
                pairs = [
                    (rate(ours, arguments.seconds), rate(theirs, arguments.seconds)) for _ in range(arguments.rounds)
                ]
        finally:
            bare.stdin.close()
            bare.wait(30)
    for service, ray in pairs:
        print(f"service {100 * service:5.2f}%   bare Ray {100 * ray:5.2f}%   more {100 * (service - ray):+5.2f}%")
    median = sorted(service - ray for service, ray in pairs)[len(pairs) // 2]
    print(f"idle, four models of two ranks: {100 * median:+.2f}% of one core more than bare Ray (bar: +2%)")


if __name__ == "__main__":
    main()
