"""What is trained: three models, and batches that each step's number decides."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim
from gradwire.errors import GradwireError

TIMEOUT = 180.0
"""Seconds that a call takes at most: faults come every 10 s, and on two cores nine ranks take as long to come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to train. `make` gives the same module every time."""

    name: str
    make: Callable[[], nn.Module]
    optimizer: Any
    shape: tuple[int, ...]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of that step. Of another number of rows each time, so that shards are ragged."""
        generator = torch.Generator().manual_seed(step)
        rows = 6 + step % 7
        inputs = torch.randn(rows, *self.shape, generator=generator)
        return inputs, torch.randint(0, 4, (rows,), generator=generator)

    def create(self, client: gradwire.Client, ranks: int) -> gradwire.Model:
        """The model on a service."""
        return client.create_model(
            self.make(),
            loss=nn.CrossEntropyLoss(),
            optimizer=self.optimizer,
            example=self.batch(0),
            workers=ranks,
            model_id=self.name,
            seed=5,
        )


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def seeded() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return make()

    return seeded


SUBJECTS = (
    Subject(
        name="momentum",
        make=_seeded(lambda: nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 4))),
        optimizer=optim.SGD(lr=0.05, momentum=0.9),
        shape=(12,),
    ),
    Subject(
        name="dropout",
        make=_seeded(lambda: nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))),
        optimizer=optim.Adam(lr=1e-3, schedule=optim.schedule.CosineAnnealingLR(T_max=5000)),
        shape=(12,),
    ),
    Subject(
        name="batch-norm",
        make=_seeded(
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)
            )
        ),
        optimizer=optim.AdamW(lr=1e-3),
        shape=(1, 6, 6),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A step that was acknowledged. begin, end: seconds of time.monotonic(). recovery: of them, the service's own."""

    begin: float
    end: float
    loss: float
    step: int
    recovery: float


class Training:
    """One model's loop, in a thread of its own with a client of its own, until `stop`. At most `rate` steps a second.

    What is refused and was not applied is asked for again.
    """

    def __init__(self, subject: Subject, target: str, ranks: int, *, rate: float, by_grpc: bool) -> None:
        self.subject = subject
        self.made: list[Made] = []
        self.refused: list[GradwireError] = []
        self.longest = 0.0
        """Seconds of the longest call, one that failed included."""
        self.in_flight = False
        self.failure: BaseException | None = None
        self._client = gradwire.connect(target, timeout=TIMEOUT, shared_memory=not by_grpc)
        self.model = subject.create(self._client, ranks)
        self._period = 1.0 / rate
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=subject.name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Return after the step in flight."""
        self._ended.set()
        self._thread.join()

    def close(self) -> None:
        """Delete the model and close the client."""
        self.model.delete()
        self._client.close()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                self._step(len(self.made))
        except BaseException as error:
            self.failure = error

    def _step(self, number: int) -> None:
        batch = self.subject.batch(number)
        begin = time.monotonic()
        self.in_flight = True
        try:
            result = self.model.train_step(*batch)
        except GradwireError as error:
            if error.outcome != "not_applied":
                raise
            self.refused.append(error)
            return
        finally:
            end = time.monotonic()
            self.in_flight = False
            self.longest = max(self.longest, end - begin)
        assert result.loss is not None
        self.made.append(
            Made(begin=begin, end=end, loss=result.loss, step=result.step, recovery=result.timing.recovery)
        )
        self._ended.wait(max(0.0, self._period - (end - begin)))


def undisturbed(client: gradwire.Client, subject: Subject, ranks: int, steps: int) -> tuple[list[float | None], Any]:
    """(losses, `everything` of the model) after so many steps without a fault."""
    model = subject.create(client, ranks)
    losses = [model.train_step(*subject.batch(number)).loss for number in range(steps)]
    state = everything(model)
    model.delete()
    return losses, state


def everything(model: gradwire.Model) -> dict[str, Any]:
    """Weights, buffers, optimizer and schedule."""
    return {"model": model.state_dict(), "optimizer": model.optimizer_state_dict()}


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two nested states are not the same, bit by bit."""
    if isinstance(expected, Tensor):
        same = isinstance(found, Tensor) and found.dtype == expected.dtype and found.shape == expected.shape
        if not same or found.reshape(-1).view(torch.uint8).ne(expected.reshape(-1).view(torch.uint8)).any():
            return [path]
        return []
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            return [path]
        return [each for name in expected for each in differences(found[name], expected[name], f"{path}.{name}")]
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return [path]
        return [
            each
            for index, (one, other) in enumerate(zip(found, expected, strict=True))
            for each in differences(one, other, f"{path}[{index}]")
        ]
    return [] if found == expected or (found != found and expected != expected) else [path]
