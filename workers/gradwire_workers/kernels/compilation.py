"""A rank's end of compiling: a process that it starts, and what that has left in a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gradwire_proto.errors import FailedPrecondition
from gradwire_workers.kernels import inductor
from gradwire_workers.kernels.order import CompileOrder
from gradwire_workers.kernels.pass_trace import PassForm

_MOST_KEPT = 256
"""Orders whose kernels stay in the folder; those that were used longest ago go."""


class Compilation:
    """Kernels for one order, in a folder of their own in `place`, which nobody else may write to.

    What is there already, of an earlier rank's, is not compiled again.
    """

    def __init__(self, order: CompileOrder, place: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        _check_private(place)
        self._folder = place / order.digest
        _make_room(place)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        os.utime(self._folder)
        if self._is_there:
            return
        if order.device == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise FailedPrecondition("the rank's node has no C++ compiler, such as g++", reason="NO_COMPILER")
        unfinished = self._folder / f"{inductor.ORDER}.{os.getpid()}"
        unfinished.write_bytes(order.encode())
        os.replace(unfinished, self._folder / inductor.ORDER)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "gradwire_workers.kernels.compiler", str(self._folder)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": str(order.threads),
            },
            stdin=subprocess.DEVNULL,
            # With the compilers that it starts in turn, to be ended as one.
            start_new_session=True,
        )

    @property
    def _is_there(self) -> bool:
        return (self._folder / inductor.ARTIFACT).exists()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self._process is None or self._process.poll() is not None

    def wait(self) -> None:
        """Return when it is over."""
        if self._process is not None:
            self._process.wait()

    @property
    def refused(self) -> str | None:
        """Once it is over: why there are no kernels; None: there are."""
        if self._is_there:
            return None
        with suppress(OSError):
            return (self._folder / inductor.REFUSED).read_text()
        return "the process that compiled them ended without a word"

    def load(self) -> tuple[Any, PassForm]:
        """(the kernels as a function, what it gives). Takes about a second the first time. Raises what torch raises."""
        compiler = inductor.set_up(self._folder)
        form = PassForm.decode(json.loads((self._folder / inductor.FORM).read_text()))
        constants = torch.load(self._folder / inductor.CONSTANTS, weights_only=True)
        kernels = compiler.CompiledArtifact.load(path=str(self._folder / inductor.ARTIFACT), format="binary")
        return lambda *tensors: kernels(*tensors, *constants), form

    def give_up(self) -> None:
        """Nobody wants the kernels any more. Idempotent."""
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _check_private(place: Path) -> None:
    """Kernels are code: nobody else may put some there."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = place.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise FailedPrecondition(f"others may write to the folder {place}", reason="KERNELS_NOT_PRIVATE")


def _make_room(place: Path) -> None:
    folders = sorted((each for each in place.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    for each in folders[:-_MOST_KEPT]:
        shutil.rmtree(each, ignore_errors=True)
