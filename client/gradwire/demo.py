"""The demo: a small convolutional network learns handwritten digits through an embedded service, in under a minute."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

from gradwire import optim
from gradwire.embedded_service import launch
from gradwire.errors import FailedPrecondition
from gradwire.terminal_plot import curve
from gradwire_proto.values import StepResult

if TYPE_CHECKING:
    from gradwire.client import Client
    from gradwire.model import Model

PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 0.1
HELD_OUT = 360
PARTS = {
    "queue": "waiting for earlier calls",
    "transfer": "tensors between frontend and ranks",
    "compute": "forward and backward",
    "all_reduce": "gradients summed over the ranks",
    "optimizer": "update of the weights",
}


@dataclass(frozen=True, kw_only=True)
class Digits:
    """1,797 pictures of 8x8 pixels in [0, 1], shaped float32[n, 1, 8, 8], and their digits, shaped int64[n]."""

    train_pictures: torch.Tensor
    train_digits: torch.Tensor
    test_pictures: torch.Tensor
    test_digits: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class History:
    """Each step's result, and the seconds that the client waited for it."""

    results: list[StepResult] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [result.loss for result in self.results if result.loss is not None]

    @property
    def smooth_losses(self) -> list[float]:
        """The mean of each loss and the 19 before it."""
        losses = self.losses
        return [fmean(losses[max(0, step - 19) : step + 1]) for step in range(len(losses))]


def run_demo(*, output: Path = Path("gradwire-demo"), workers: int = 2, epochs: int = 12) -> float:
    """Trains, prints and draws; returns the accuracy on pictures that were held out, between 0 and 1.

    Writes loss.png and weights.pt to the folder `output`. Raises FailedPrecondition where scikit-learn or matplotlib
    are missing (`pip install 'gradwire[demo]'` brings both).
    """
    require_packages()
    console, began = Console(), time.monotonic()
    digits = load_digits()
    with console.status(f"Launching an embedded service for {workers} ranks ..."):
        client = launch(workers=workers)
    with client:
        console.print(f"Service on {client.target} after {time.monotonic() - began:.1f} s", highlight=False)
        model = create(client, digits, workers, console)
        history = train(model, digits, epochs, console)
        correct = model.forward(digits.test_pictures).argmax(dim=1) == digits.test_digits
        weights = model.state_dict()
    accuracy = correct.float().mean().item()
    output.mkdir(parents=True, exist_ok=True)
    torch.save(weights, output / "weights.pt")
    draw(history, output / "loss.png")
    console.print(f"\nLoss over {len(history.losses)} steps, mean of 20, logarithmic")
    picture = curve(history.smooth_losses, width=min(60, console.width - 12), logarithmic=True)
    console.print(picture, highlight=False, soft_wrap=True)
    console.print()
    console.print(time_split(history))
    console.print(f"Held-out accuracy: [bold]{accuracy:.1%}[/] of {HELD_OUT} pictures")
    console.print(f"Loss curve:        {(output / 'loss.png').resolve()}", soft_wrap=True)
    console.print(f"Weights:           {(output / 'weights.pt').resolve()}", soft_wrap=True)
    console.print(f"All in {time.monotonic() - began:.0f} s. The service is gone and left nothing else behind.")
    return accuracy


def require_packages() -> None:
    """Raises FailedPrecondition where a package that only the demo needs is missing."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise FailedPrecondition(
            f"the demo needs {' and '.join(missing)}: pip install 'gradwire[demo]'", reason="DEMO_NEEDS_PACKAGES"
        )


def load_digits() -> Digits:
    """scikit-learn's handwritten digits, mixed with a fixed seed and cut in two."""
    from sklearn import datasets

    pixels, digits = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(pixels, dtype=torch.float32).div(16).reshape(-1, 1, 8, 8)[order]
    targets = torch.tensor(digits, dtype=torch.int64)[order]
    return Digits(
        train_pictures=pictures[HELD_OUT:],
        train_digits=targets[HELD_OUT:],
        test_pictures=pictures[:HELD_OUT],
        test_digits=targets[:HELD_OUT],
    )


def convolutional_network() -> nn.Module:
    """float32[n, 1, 8, 8] -> float32[n, 10]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def create(client: Client, digits: Digits, workers: int, console: Console) -> Model:
    """The network as a model on the service, and a line about it."""
    began = time.monotonic()
    torch.manual_seed(0)
    with console.status("Creating the model ..."):
        model = client.create_model(
            convolutional_network(),
            loss=nn.CrossEntropyLoss(),
            optimizer=optim.SGD(lr=PEAK_LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4),
            example=(digits.train_pictures[:4], digits.train_digits[:4]),
            workers=workers,
        )
    info = model.info()
    console.print(
        f"Model {info.id} of {info.num_parameters:,} parameters on {info.workers} ranks "
        f"after {time.monotonic() - began:.1f} s",
        highlight=False,
    )
    return model


def train(model: Model, digits: Digits, epochs: int, console: Console) -> History:
    """One train_step for each batch, the learning rate falling in a straight line to a twentieth."""
    history, mixer = History(), torch.Generator().manual_seed(0)
    steps = epochs * -(-len(digits.train_digits) // BATCH_SIZE)
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("train", total=steps, loss=float("nan"))
        for _ in range(epochs):
            for rows in torch.randperm(len(digits.train_digits), generator=mixer).split(BATCH_SIZE):
                rate = PEAK_LEARNING_RATE * (1 - 0.95 * len(history.results) / steps)
                start = time.perf_counter()
                result = model.train_step(digits.train_pictures[rows], digits.train_digits[rows], lr=rate)
                history.waited.append(time.perf_counter() - start)
                history.results.append(result)
                progress.update(task, advance=1, loss=result.loss)
    return history


def time_split(history: History) -> Table:
    """Where the median step's time went, in milliseconds. The last row is the client's own side and gRPC."""
    table = Table("part", "ms", "what it is", title="Median step", title_justify="left")
    for part, meaning in PARTS.items():
        table.add_row(part, f"{1e3 * median(getattr(result.timing, part) for result in history.results):.2f}", meaning)
    frontend = median(result.timing.total for result in history.results)
    waited = median(history.waited)
    table.add_row("wire", f"{1e3 * (waited - frontend):.2f}", "client, gRPC and encoding", end_section=True)
    table.add_row("total", f"{1e3 * waited:.2f}", "as the client sees it")
    table.columns[1].justify = "right"
    return table


def draw(history: History, path: Path) -> None:
    """The loss of every step, and its running mean, as a PNG."""
    # Not pyplot: it would look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(history.losses, linewidth=0.8, alpha=0.4, label="each step")
    axes.plot(history.smooth_losses, linewidth=2, label="mean of 20")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Handwritten digits through gradwire")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.savefig(path, dpi=120)
