"""How far a fit has come, as a line on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradwire.fit_results import FitStatus


class ProgressLine:
    """A callback of a fit with so many steps, which shows them on stderr for as long as it is open."""

    def __init__(self, total: int) -> None:
        words = TextColumn("epoch {task.fields[epoch]}  loss {task.fields[loss]:.6g}{task.fields[validation]}")
        columns = (TextColumn("fit"), BarColumn(), MofNCompleteColumn(), words, TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._task = self._progress.add_task("fit", total=total, epoch=1, loss=float("nan"), validation="")

    def __enter__(self) -> ProgressLine:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, status: FitStatus) -> None:
        shown: dict[str, object] = {"epoch": f"{status.epoch + 1}/{status.epochs}"}
        if status.losses:
            shown["loss"] = status.losses[-1]
        if status.validation_loss is not None:
            shown["validation"] = f"  validation {status.validation_loss:.6g}"
        self._progress.update(self._task, completed=status.steps, **shown)  # pyright: ignore[reportArgumentType]
