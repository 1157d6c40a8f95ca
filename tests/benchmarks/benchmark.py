"""What all benchmarks have in common: where and how often they measure, and that each runs alone."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from benchmarks.rows import Row


@dataclass(frozen=True, kw_only=True)
class Setting:
    """rounds: how often each thing is measured. device: "cpu" or "cuda"."""

    rounds: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """measure: yields rows as they are found. rounds: how many are enough. devices: those that it can measure on."""

    measure: Callable[[Setting], Iterator[Row]]
    rounds: int
    devices: tuple[str, ...] = ("cpu",)

    def run(self, rounds: int | None, device: str) -> list[Row]:
        """Its rows, each printed as soon as it is there. rounds: None for as many as are enough."""
        logging.disable(logging.WARNING)
        torch.set_num_threads(1)
        found = []
        for row in self.measure(Setting(rounds=rounds or self.rounds, device=device)):
            print(row, file=sys.stderr, flush=True)
            found.append(row)
        return found

    def alone(self) -> None:
        """What `python -m benchmarks.NAME` does."""
        options = arguments(sys.modules["__main__"].__doc__, self.devices).parse_args()
        check_device(options.device)
        self.run(options.rounds, options.device)


def arguments(description: str | None, devices: tuple[str, ...]) -> argparse.ArgumentParser:
    """Takes `--rounds` and `--device`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=_at_least_one, metavar="N", help="measure so often, instead of each benchmark's number"
    )
    parser.add_argument("--device", choices=devices, default="cpu")
    return parser


def _at_least_one(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def check_device(device: str) -> None:
    """Ends the program where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device")
