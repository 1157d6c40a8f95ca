"""Faults of seven kinds, in an order and at moments that a seed decides."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psutil
from chaos.service_processes import frontends, raylets, serving_ranks
from cutting_proxy import CuttingProxy

LONGEST_PAUSE = 20.0
"""Seconds that a process stands still at most."""
_PATIENCE = 10.0
"""Seconds to wait for a process to strike, or for a command to be in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One that happened. `at`: seconds of time.monotonic(). `in_flight`: whether a command of every model was."""

    kind: str
    at: float
    in_flight: bool


Strike = Callable[[], bool]
"""Lets a fault happen that is ready to; False where whom it should hit has gone."""


class Faults:
    """Strikes one after another in a thread of its own, until `stop`.

    pause: the least and the most seconds between two. busy: whether commands are in flight. Every kind comes equally
    often, in shuffled rounds.
    """

    def __init__(self, proxy: CuttingProxy, busy: Callable[[], bool], *, seed: int, pause: tuple[float, float]) -> None:
        self.happened: list[Fault] = []
        self.missed: list[str] = []
        """Kinds for which there was nobody to strike."""
        self._proxy = proxy
        self._busy = busy
        self._random = random.Random(seed)
        self._pause = pause
        self._ended = threading.Event()
        self._resuming: list[threading.Timer] = []
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)
        self._strikes: dict[str, Callable[[], Strike | None]] = {
            "kill rank": lambda: self._kill(serving_ranks),
            "kill frontend": lambda: self._kill(frontends),
            "stop rank": lambda: self._stop(serving_ranks),
            "stop frontend": lambda: self._stop(frontends),
            "cut connection": self._cut,
            "cut after request": self._cut_after_request,
            "kill raylet": lambda: self._kill(raylets),
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        """Every kind that there is."""
        return tuple(self._strikes)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """No more; what stands still goes on."""
        self._ended.set()
        self._thread.join()
        for timer in self._resuming:
            timer.cancel()
            timer.function(*timer.args)

    def _run(self) -> None:
        while True:
            for kind in self._random.sample(self.kinds, len(self.kinds)):
                if self._ended.wait(self._random.uniform(*self._pause)):
                    return
                strike = self._strikes[kind]()
                if strike is None:
                    self.missed.append(kind)
                    continue
                # Whom it strikes is known by now: looking for that takes longer than a command.
                _wait_until(self._busy, _PATIENCE)
                in_flight, at = self._busy(), time.monotonic()
                if strike():
                    self.happened.append(Fault(kind=kind, at=at, in_flight=in_flight))
                else:
                    self.missed.append(kind)

    def _kill(self, candidates: Callable[[], Sequence[psutil.Process]]) -> Strike | None:
        return self._signal(candidates, signal.SIGKILL)

    def _stop(self, candidates: Callable[[], Sequence[psutil.Process]]) -> Strike | None:
        return self._signal(candidates, signal.SIGSTOP, self._resume_later)

    def _resume_later(self, stopped: psutil.Process) -> None:
        timer = threading.Timer(self._random.uniform(1.0, LONGEST_PAUSE), _resume, [stopped])
        timer.daemon = True
        self._resuming.append(timer)
        timer.start()

    def _signal(
        self,
        candidates: Callable[[], Sequence[psutil.Process]],
        number: int,
        then: Callable[[psutil.Process], None] = lambda _: None,
    ) -> Strike | None:
        deadline = time.monotonic() + _PATIENCE
        while not (found := sorted(candidates(), key=lambda each: each.pid)):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.1)
        chosen = self._random.choice(found)

        def strike() -> bool:
            try:
                # psutil looks whether the id is still that process's.
                chosen.send_signal(number)
            except psutil.Error:
                return False
            then(chosen)
            return True

        return strike

    def _cut(self) -> Strike:
        return lambda: self._proxy.cut() is None

    def _cut_after_request(self) -> Strike:
        return lambda: self._proxy.cut_after_request() is None


def _resume(process: psutil.Process) -> None:
    try:
        process.send_signal(signal.SIGCONT)
    except psutil.Error:
        return  # Somebody has killed it meanwhile.


def _wait_until(condition: Callable[[], bool], patience: float) -> None:
    deadline = time.monotonic() + patience
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.0005)
