"""What a load test is told, checked before anything is started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import InvalidArgument
from gradwire.load_test import arrivals
from gradwire.load_test.loads import Load

METHODS = {"compute_gradients": "ComputeGradients", "train_step": "TrainStep", "forward": "Forward"}
"""By the SDK's name: the RPC."""

SHAPES = {"small": (32, 64, 10), "medium": (784, 1024, 10)}
"""Layers by their size: features, hidden units, classes."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """A load test.

    loads: the levels of the sweep, in order. arrivals: "constant" or "poisson", for rates. models: how many to create,
    where `model_ids` names none that exist. workers: the ranks of each. layers: their sizes, from features to classes.
    batch: rows of each request. clients: connections. warm_up, window, timeout: seconds. stable: by how much of their
    mean three windows may differ. percentile: which latency has to be stable and within `latency_limit` (milliseconds);
    None for the mean. search: halve the levels for the highest within that limit, instead of taking one after another.
    floor: measure a bare echo too.

    Raises InvalidArgument, whose `field` is the option of the command line.
    """

    loads: tuple[Load, ...]
    arrivals: str = "constant"
    models: int = 1
    model_ids: tuple[str, ...] = ()
    workers: int = 2
    clients: int = 1
    method: str = "compute_gradients"
    layers: tuple[int, ...] = SHAPES["small"]
    batch: int = 32
    warm_up: float = 1.0
    window: float = 2.0
    max_windows: int = 10
    stable: float = 0.10
    percentile: float | None = None
    latency_limit: float | None = None
    search: bool = False
    timeout: float = 30.0
    seed: int = 0
    floor: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.loads), "--concurrency", "expected at least one level")
        _require(self.arrivals in arrivals.KINDS, "--arrivals", f"expected one of {', '.join(arrivals.KINDS)}")
        _require(self.method in METHODS, "--method", f"expected one of {', '.join(METHODS)}")
        for name in ("models", "workers", "clients", "batch", "max_windows"):
            value = getattr(self, name)
            _require(value >= 1, f"--{name.replace('_', '-')}", f"expected at least 1, got {value}")
        for name in ("window", "timeout", "stable"):
            _require(_is_above(getattr(self, name), 0), f"--{name}", "expected a finite number above 0")
        _require(self.warm_up == 0 or _is_above(self.warm_up, 0), "--warm-up", "expected a finite number, at least 0")
        _require(len(self.layers) >= 2, "--layers", 'expected two sizes at least, such as "784,1024,10"')
        _require(all(size >= 1 for size in self.layers), "--layers", "expected sizes of at least 1")
        if self.percentile is not None:
            _require(
                0 < self.percentile <= 100,
                "--percentile",
                f"expected more than 0 and at most 100, got {self.percentile:g}",
            )
        if self.latency_limit is not None:
            _require(_is_above(self.latency_limit, 0), "--latency-limit", "expected a finite number above 0")
        if self.search:
            values = [load.value for load in self.loads]
            _require(self.latency_limit is not None, "--search", "expected a --latency-limit to search for")
            _require(values == sorted(values), "--search", "expected levels that rise")
        if self.model_ids and self.method == "train_step":
            _require(
                False,
                "--method",
                "train_step would change the models that --model names: compute_gradients and forward do not",
            )

    @property
    def is_open_loop(self) -> bool:
        """Whether requests come at a rate, however late the answers are."""
        return self.loads[0].is_rate


def parse_layers(text: str) -> tuple[int, ...]:
    """The sizes in "784,1024,10". Raises InvalidArgument."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f'expected whole numbers such as "784,1024,10", got {text!r:.80}'
        raise InvalidArgument(message, field="--layers", reason="OPTION_INVALID") from None


def check_writable(path: Path | None, field: str) -> None:
    """Raise InvalidArgument where no file can be written there: better known before the test than after it."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        message = f"{path} cannot be written: {'a folder' if path.is_dir() else 'its folder does not exist'}"
        raise InvalidArgument(message, field=field, reason="OPTION_INVALID")


def _is_above(value: float, bound: float) -> bool:
    return math.isfinite(value) and value > bound


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise InvalidArgument(message, field=field, reason="OPTION_INVALID")
