"""Restarts in a row, as an upgrade makes them: `python -m chaos.rolling` in tests/.

The frontend is stopped by SIGTERM and started again on its port, every 20 s for five minutes, while models are trained
by single steps, past gRPC and in a stream, and other clients put load on the service through the SDK. No call may fail,
no step be lost or applied twice, and no bit differ from a run without restarts. The exit code is 1 where that broke.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from chaos.report import quantile
from chaos.run import broken_promises, compared
from chaos.service_processes import frontends
from chaos.training import SUBJECTS, Made, Subject, Training, everything

import gradwire
from gradwire.errors import GradwireError

RATE = 20.0
"""Steps a second of each model, at most."""
_LOAD_RATE = 10.0
"""Calls a second of each client that puts load on the service, at most."""
_TIMEOUT = 120.0
"""Seconds that a call may take: a restart among others on two busy cores takes a tenth of it."""
_SLOWEST_STOP = 60.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of it. stops: seconds that each frontend took to end. made: the steps of each training. calls: seconds
    of those of the load. `wrong` is empty where all promises were kept.
    """

    stops: list[float] = field(default_factory=list)
    made: list[list[Made]] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class StreamTraining(Training):
    """The same loop by `train_steps`: steps on their way while those before are computed."""

    def _run(self) -> None:
        begin = time.monotonic()
        try:
            for result in self.model.train_steps(self._batches(), in_flight=8):
                end = time.monotonic()
                self.longest = max(self.longest, end - begin)
                assert result.loss is not None
                self.made.append(Made(begin=begin, end=end, loss=result.loss, step=result.step, recovery=0.0))
                begin = end
        except BaseException as error:
            self.failure = error

    def _batches(self) -> Iterator[Any]:
        number = 0
        while not self._ended.wait(self._period):
            yield self.subject.batch(number)
            number += 1


class Load:
    """A client that reads gradients from a model that nobody trains, one call after another: each has the same bits."""

    def __init__(self, target: str, subject: Subject) -> None:
        self.calls: list[float] = []
        self.failures: list[BaseException] = []
        self._client = gradwire.connect(target, timeout=_TIMEOUT, shared_memory=False)
        self._model = self._client.get_model(_LOADED)
        self._batch = subject.batch(1)
        self._expected = self._model.compute_gradients(*self._batch).gradients
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Return after the call in flight."""
        self._ended.set()
        self._thread.join()
        self._client.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            begin = time.monotonic()
            try:
                found = self._model.compute_gradients(*self._batch).gradients
                if any(not torch.equal(found[name], each) for name, each in self._expected.items()):
                    self.failures.append(AssertionError("gradients of a model that nobody trains have changed"))
            except GradwireError as error:
                self.failures.append(error)
            took = time.monotonic() - begin
            self.calls.append(took)
            self._ended.wait(max(0.0, 1 / _LOAD_RATE - took))


_LOADED = "loaded"
_RANKS = 2


def roll(*, seconds: float, every: float, storage: Path, clients: int = 4) -> Outcome:
    """Train and load for so many seconds, with a restart every so many; compare with a run without any."""
    outcome = Outcome()
    momentum, dropout, batch_norm = SUBJECTS
    with gradwire.launch(workers=3 * _RANKS + 1, storage=storage, spare_ranks=1, threads_per_rank=1) as client:
        trainings = [
            Training(momentum, client.target, _RANKS, rate=RATE, by_grpc=True),
            StreamTraining(dropout, client.target, _RANKS, rate=RATE, by_grpc=True),
            Training(batch_norm, client.target, _RANKS, rate=RATE, by_grpc=False),
        ]
        loaded = Subject(name=_LOADED, make=momentum.make, optimizer=momentum.optimizer, shape=momentum.shape)
        loaded.create(client, 1)
        loads = [Load(client.target, loaded) for _ in range(clients)]
        for each in (*trainings, *loads):
            each.start()
        end = time.monotonic() + seconds
        while time.monotonic() + every < end:
            time.sleep(every)
            outcome.stops.append(_restart(client))
        time.sleep(max(0.0, end - time.monotonic()))
        for each in (*trainings, *loads):
            each.stop()
        states = {each.subject.name: everything(each.model) for each in trainings if each.failure is None}
    for each in loads:
        outcome.calls += each.calls
        outcome.wrong += [f"a call of the load failed with {type(error).__name__}: {error}" for error in each.failures]
    for each in trainings:
        outcome.made.append(each.made)
        outcome.wrong += broken_promises(each)
        name = each.subject.name
        outcome.wrong += [f"{name}: a call failed with {type(error).__name__}: {error}" for error in each.refused]
    with gradwire.launch(workers=_RANKS, threads_per_rank=1) as client:
        for each in trainings:
            if each.subject.name in states:
                outcome.wrong += compared(client, each, _RANKS, states[each.subject.name])
    return outcome


def _restart(client: gradwire.Client) -> float:
    """Stop the frontend; its supervisor starts another on the same port. Seconds until the first had ended."""
    (frontend,) = _running_frontend()
    begin = time.monotonic()
    frontend.terminate()
    frontend.wait(_SLOWEST_STOP)
    took = time.monotonic() - begin
    # The next restart is one of a service that serves again.
    client.server_info()
    return took


def _running_frontend() -> list[psutil.Process]:
    deadline = time.monotonic() + _SLOWEST_STOP
    while len(found := frontends()) != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos.rolling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="in all")
    parser.add_argument("--every", type=float, default=20.0, help="seconds from one restart to the next")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = roll(seconds=options.seconds, every=options.every, storage=Path(folder) / "storage")
    print(f"{len(outcome.stops)} restarts, each ended within {max(outcome.stops):.1f} s")
    for made in outcome.made:
        slowest = max((each.end - each.begin for each in made), default=0.0)
        print(f"  a training made {len(made)} steps; the slowest took {slowest:.1f} s")
    p50, most = quantile(outcome.calls, 0.5), max(outcome.calls)
    print(f"  {len(outcome.calls)} calls of the load, p50 {1000 * p50:.0f} ms, slowest {most:.1f} s")
    for each in outcome.wrong:
        print(f"WRONG: {each}")
    print("all promises were kept" if not outcome.wrong else f"{len(outcome.wrong)} promises were broken")
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
