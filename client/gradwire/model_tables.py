"""How the command line shows models: as JSON-able values and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.table import Table

from gradwire_proto.values import GraphLossSpec, LossSpec, ModelInfo, OutputLossSpec


def summary(info: ModelInfo) -> dict[str, Any]:
    """What programs read: plain values, tensors and graphs left out. `created_at` is in seconds since 1970, UTC."""
    return {
        "id": info.id,
        "state": info.state,
        "step": info.step,
        "workers": info.workers,
        "device": info.device,
        "num_parameters": info.num_parameters,
        "optimizer": info.optimizer and info.optimizer.name,
        "loss": _loss_name(info.loss),
        "sharding": info.sharding and {"mode": info.sharding.mode, "reason": info.sharding.reason},
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
            info.id, info.state, str(info.step), str(info.workers), parameters, optimizer, _time(info.created_at)
        )
    return table


def model_table(info: ModelInfo) -> Table:
    """One row per property of a model; those that it lacks are left out."""
    table = Table("property", "value", box=None, show_header=False)
    for name, value in summary(info).items():
        if value is None or value == {}:
            continue
        table.add_row(name, _text(name, value))
    return table


def _text(name: str, value: Any) -> str:
    if name == "created_at":
        return _time(value)
    if name == "sharding":
        return f"{value['mode']} ({value['reason']})" if value["reason"] else value["mode"]
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return f"{value:,}" if name == "num_parameters" else str(value)


def _loss_name(loss: LossSpec | None) -> str | None:
    if loss is None:
        return None
    if isinstance(loss, OutputLossSpec):
        return "output of the program"
    return "graph" if isinstance(loss, GraphLossSpec) else loss.name


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
