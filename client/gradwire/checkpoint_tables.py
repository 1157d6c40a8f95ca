"""How the command line shows checkpoints: as JSON-able values and as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.filesize import decimal
from rich.table import Table

from gradwire.model_tables import time_text
from gradwire_proto.values import Checkpoint


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What programs read. `created_at` is in seconds since 1970, UTC; `nbytes` counts all files."""
    return {
        "name": checkpoint.name,
        "model": checkpoint.model_id,
        "step": checkpoint.step,
        "command": checkpoint.command,
        "automatic": checkpoint.automatic,
        "nbytes": checkpoint.nbytes,
        "created_at": checkpoint.created_at,
    }


def checkpoints_table(checkpoints: Sequence[Checkpoint]) -> Table:
    """One row per checkpoint."""
    table = Table("checkpoint", "model", "step", "size", "automatic", "created", box=None)
    for each in checkpoints:
        automatic = "yes" if each.automatic else "no"
        size = decimal(each.nbytes)
        table.add_row(each.name, each.model_id, str(each.step), size, automatic, time_text(each.created_at))
    return table


def checkpoint_table(checkpoint: Checkpoint) -> Table:
    """One row per property of a checkpoint."""
    table = Table("property", "value", box=None, show_header=False)
    for name, value in summary(checkpoint).items():
        table.add_row(name, time_text(value) if name == "created_at" else str(value))
    return table
