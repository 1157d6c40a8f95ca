"""A run under faults, and the same run without: what is wrong afterwards, in words."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from chaos.faults import Fault, Faults
from chaos.service_processes import processes, ranks
from chaos.training import SUBJECTS, TIMEOUT, Made, Training, differences, everything, undisturbed
from cutting_proxy import CuttingProxy

import gradwire

RATE = 20.0
"""Steps a second of each model, at most: what has to be done again without faults stays bounded."""
_SPARES = 3
_SETTLES = 60.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came of a run. `wrong` is empty where all promises were kept."""

    ranks: int
    faults: list[Fault] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    made: list[list[Made]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)


def run(
    *, ranks_each: int, seconds: float, seed: int, pause: tuple[float, float], storage: Path | None = None
) -> Outcome:
    """Train all subjects on `ranks_each` ranks for so many seconds under faults; compare with a run without any."""
    outcome = Outcome(ranks=ranks_each)
    workers = ranks_each * len(SUBJECTS)
    begin = time.monotonic()
    with gradwire.launch(workers=workers, storage=storage, spare_ranks=_SPARES, threads_per_rank=1) as client:
        proxy = CuttingProxy(client.target)
        # The last makes its calls past gRPC, and is hit by all faults but those of the connection.
        trainings = [
            Training(subject, proxy.target, ranks_each, rate=RATE, by_grpc=subject is not SUBJECTS[-1])
            for subject in SUBJECTS
        ]
        before = _Holdings.now()
        faults = Faults(proxy, lambda: all(each.in_flight for each in trainings), seed=seed, pause=pause)
        for each in (*trainings, faults):
            each.start()
        time.sleep(seconds)
        faults.stop()
        for each in trainings:
            each.stop()
        outcome.faults, outcome.missed = faults.happened, faults.missed
        outcome.seconds = time.monotonic() - begin
        states = {each.subject.name: everything(each.model) for each in trainings if each.failure is None}
        outcome.wrong += before.what_grew(most_ranks=workers + _SPARES + 1)
        for each in trainings:
            each.close()
        proxy.close()
    for each in trainings:
        outcome.made.append(each.made)
        outcome.refused.update(error.reason for error in each.refused)
        outcome.wrong += broken_promises(each)
    with gradwire.launch(workers=ranks_each, threads_per_rank=1) as client:
        for each in trainings:
            if each.subject.name in states:
                outcome.wrong += compared(client, each, ranks_each, states[each.subject.name])
    return outcome


def broken_promises(training: Training) -> list[str]:
    """What the training itself shows of them, in words."""
    name, wrong = training.subject.name, []
    if training.failure is not None:
        wrong.append(f"{name}: the loop ended with {type(training.failure).__name__}: {training.failure}")
    if training.longest > TIMEOUT + 1.0:
        wrong.append(f"{name}: a call took {training.longest:.1f} s, and its timeout is {TIMEOUT:g} s")
    counted = [each.step for each in training.made]
    if counted != list(range(1, len(counted) + 1)):
        first = next(index for index, step in enumerate(counted) if step != index + 1)
        wrong.append(f"{name}: acknowledged step {first + 1} says that it is step {counted[first]}")
    return wrong


def compared(client: gradwire.Client, training: Training, ranks_each: int, state: dict) -> list[str]:
    """What is not as without faults, in words."""
    name = training.subject.name
    losses, expected = undisturbed(client, training.subject, ranks_each, len(training.made))
    wrong = [f"{name}: {path} is not as without faults" for path in differences(state, expected)]
    apart = [index for index, made in enumerate(training.made) if made.loss != losses[index]]
    if apart:
        wrong.append(f"{name}: {len(apart)} losses are not as without faults, that of step {apart[0] + 1} first")
    return wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class _Holdings:
    """What the service holds of the machine, where nothing should grow."""

    processes: int
    shared_files: int
    threads_of_client: int

    @classmethod
    def now(cls) -> _Holdings:
        return cls(
            processes=len(processes()),
            shared_files=len(list(Path("/dev/shm").glob("gradwire-*/**/*"))),
            threads_of_client=psutil.Process().num_threads(),
        )

    def what_grew(self, *, most_ranks: int) -> list[str]:
        """What there is more of than there was, once it had time to settle."""
        deadline = time.monotonic() + _SETTLES
        while True:
            now, grown = _Holdings.now(), []
            if len(ranks()) > most_ranks:
                grown.append(f"there are {len(ranks())} ranks, and {most_ranks} would do")
            if now.processes > self.processes + _SPARES + 1:
                grown.append(f"there were {self.processes} processes, and {now.processes} in the end")
            if now.shared_files > self.shared_files + 2 * most_ranks:
                grown.append(f"{self.shared_files} files in shared memory became {now.shared_files}")
            if now.threads_of_client > self.threads_of_client + 8:
                grown.append(f"the client had {self.threads_of_client} threads, and {now.threads_of_client} in the end")
            if not grown or time.monotonic() > deadline:
                return grown
            time.sleep(0.5)
