"""How the command line shows models: as JSON-able values and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from gradwire_proto.values import GraphLossSpec, LossSpec, ModelInfo, OutputLossSpec, ScheduleSpec


def summary(info: ModelInfo) -> dict[str, Any]:
    """What programs read: plain values, tensors and graphs left out. `created_at` is in seconds since 1970, UTC."""
    return {
        "id": info.id,
        "state": info.state,
        "step": info.step,
        "workers": info.workers,
        "device": info.device,
        "architecture": info.architecture,
        "num_parameters": info.num_parameters,
        "optimizer": info.optimizer and info.optimizer.name,
        "optimizer_options": _options(info.optimizer.options) if info.optimizer else {},
        "parameter_groups": [
            {"pattern": group.pattern, **_options(group.options)}
            for group in (info.optimizer.groups if info.optimizer else ())
        ],
        "schedule": _schedule(info.optimizer.schedule) if info.optimizer and info.optimizer.schedule else None,
        "clip_grad_norm": info.clip_grad_norm,
        "clip_grad_value": info.clip_grad_value,
        "precision": info.precision,
        "loss": _loss_name(info.loss),
        "sharding": info.sharding and {"mode": info.sharding.mode, "reason": info.sharding.reason},
        "durability": info.durability or None,
        "checkpoint_every": info.checkpoint_every or None,
        "keep_checkpoints": info.keep_checkpoints or None,
        "deterministic": info.deterministic,
        "sync_batch_norm": info.sync_batch_norm,
        "compile": info.compile,
        "compiled": [
            {"variant": each.batches.variant, "state": each.state, "reason": each.reason} for each in info.compiled
        ],
        "waits_for": info.waits_for or None,
        "labels": dict(info.labels),
        "created_at": info.created_at,
        "last_error": info.last_error,
    }


def models_table(infos: Sequence[ModelInfo]) -> Table:
    """One row per model."""
    table = Table("model", "state", "step", "workers", "parameters", "optimizer", "created", box=None)
    for info in infos:
        optimizer = info.optimizer.name if info.optimizer else "-"
        parameters = f"{info.num_parameters:,}"
        table.add_row(
            info.id, info.state, str(info.step), str(info.workers), parameters, optimizer, time_text(info.created_at)
        )
    return table


def model_table(info: ModelInfo) -> Table:
    """One row per property of a model; those that it lacks are left out."""
    table = Table("property", "value", box=None, show_header=False)
    for name, value in summary(info).items():
        if value is None or value in ({}, []):
            continue
        table.add_row(name, _text(name, value))
    return table


def _text(name: str, value: Any) -> str:
    if name == "created_at":
        return time_text(value)
    if name == "sharding":
        return f"{value['mode']} ({value['reason']})" if value["reason"] else value["mode"]
    if name == "schedule":
        return value["name"] + "".join(f" {key}={item}" for key, item in value.items() if key != "name")
    if isinstance(value, list):
        return "; ".join(_text("", item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return f"{value:,}" if name == "num_parameters" else str(value)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are None: torch chooses them."""
    return {name: value for name, value in options.items() if value is not None}


def _schedule(schedule: ScheduleSpec) -> dict[str, Any]:
    parts = {"schedulers": [_schedule(part) for part in schedule.schedulers]} if schedule.schedulers else {}
    return {"name": schedule.name, **_options(schedule.options), **parts}


def _loss_name(loss: LossSpec | None) -> str | None:
    if loss is None:
        return None
    if isinstance(loss, OutputLossSpec):
        return "output of the program"
    return "graph" if isinstance(loss, GraphLossSpec) else loss.name


def time_text(seconds: float) -> str:
    """Seconds since 1970 as the local date and time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
