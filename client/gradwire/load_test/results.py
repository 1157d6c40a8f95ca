"""The levels of a load test as plain values, and as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from gradwire.load_test.levels import Level
from gradwire.load_test.options import Options
from gradwire.load_test.windows import Window

SPLIT = ("queue", "transfer", "compute", "all_reduce", "optimizer", "recovery", "other", "outside")
"""The parts of a request's time, in the order in which they are shown."""

LATENCIES = ("mean", "p50", "p90", "p95", "p99", "max")


@dataclass(frozen=True, kw_only=True)
class Results:
    """A load test: where, with which options, and what it gave. started: seconds since 1970."""

    target: str
    options: Options
    started: float
    levels: Sequence[Level]
    is_embedded: bool = False

    @property
    def time(self) -> str:
        """When it started, as ISO 8601 has it, UTC."""
        return datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds")


def level_values(level: Level) -> dict[str, Any]:
    """One level, flat. Rates are per second, latencies and parts of them in milliseconds, None where there are none."""
    floor = level.floor
    return {
        "load": level.load.kind,
        "level": level.load.value,
        "requests_per_second": _rounded(level.rate),
        **{f"{name}_ms": _rounded(level.latencies_ms[name]) for name in LATENCIES},
        **{f"{part}_ms": _rounded(level.split_ms.get(part)) for part in SPLIT},
        "requests": level.measured.answered,
        "unsent": level.measured.unsent,
        "errors": level.errors,
        "seconds": _rounded(level.measured.seconds),
        "windows": len(level.windows),
        "stable": level.stable,
        "lag_p99_ms": _milliseconds(level.measured.lags.percentile(99)),
        "tester_cpu": _rounded(level.tester_cpu),
        "floor_requests_per_second": _rounded(floor.rate) if floor else None,
        "floor_p50_ms": _rounded(floor.latencies_ms["p50"]) if floor else None,
        "ratio": _rounded(level.ratio),
        "notes": "; ".join(level.notes),
    }


def as_csv(results: Results) -> str:
    """A line for each level. `errors_by_reason`: "REASON=count", with spaces between."""
    rows = [
        level_values(level) | {"errors_by_reason": " ".join(f"{why}={count}" for why, count in _errors(level).items())}
        for level in results.levels
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_json(results: Results) -> str:
    """All that is known: options, levels with their windows, and each level's histogram."""
    return json.dumps(
        {
            "gradwire": version("gradwire"),
            "target": results.target,
            "embedded": results.is_embedded,
            "started": results.time,
            "options": _plain_options(results.options),
            "levels": [_json_level(level) for level in results.levels],
        }
    )


def _json_level(level: Level) -> dict[str, Any]:
    return level_values(level) | {
        "errors_by_reason": _errors(level),
        "measured_windows": [_window_values(window) for window in level.windows],
        # [latency in microseconds, how often]: percentiles of any kind can be had from these.
        "histogram_us": [list(pair) for pair in level.measured.latencies],
        "floor": _json_level(level.floor) if level.floor else None,
    }


def _window_values(window: Window) -> dict[str, Any]:
    return {
        "seconds": _rounded(window.seconds),
        "requests_per_second": _rounded(window.rate),
        "mean_ms": _milliseconds(window.latencies.mean),
        "p99_ms": _milliseconds(window.latencies.percentile(99)),
        "errors": window.errors.total(),
    }


def _plain_options(options: Options) -> dict[str, Any]:
    return {**asdict(options), "loads": [str(load) for load in options.loads]}


def _errors(level: Level) -> Mapping[str, int]:
    """By reason, the most frequent first."""
    return dict(level.measured.errors.most_common())


def _milliseconds(microseconds: float | None) -> float | None:
    return None if microseconds is None else _rounded(microseconds / 1000)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
