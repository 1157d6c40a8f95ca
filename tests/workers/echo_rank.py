"""A rank's serving end without Ray and torch: a process that echoes. `python echo_rank.py ENDPOINT PATIENCE`."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.rank_server import RankServer
from gradwire_workers.step_rows import StepRow


def rows_of(steps: Sequence[int]) -> Iterator[StepRow]:
    """A row for each number, up to a negative one, which is refused."""
    for step in steps:
        if step < 0:
            raise InvalidArgument("negative", field="steps", reason="OUT_OF_RANGE")
        yield StepRow(0.5, step, 0.1, None, False, None, 1e-3, 0.0, 1e-4, 2e-3)


class Echo:
    needs_rejoin = False

    def __init__(self) -> None:
        self._counted = 0

    def answer(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any] | Iterator[StepRow]:
        match kind:
            case "train_steps":
                return rows_of(fields["steps"])
            case "echo":
                return fields
            case "count":
                self._counted += 1
                return {"count": self._counted}
            case "sleep":
                time.sleep(fields["seconds"])
                return {}
            case "hold the interpreter":
                # Unlike CDLL's, these calls keep the lock that all of Python's threads need.
                ctypes.PyDLL(None).sleep(fields["seconds"])
                return {}
            case "processor_seconds":
                return {"seconds": time.process_time()}
            case "refuse":
                raise InvalidArgument("too big", field="batch.inputs[0]", reason="SHAPE_MISMATCH")
            case "answer what cannot be sent":
                return {"outputs": [object()]}
            case "end the thread":
                raise SystemExit
            case "exit":
                os._exit(1)
            case _:
                raise ZeroDivisionError(kind)


if __name__ == "__main__":
    RankServer(sys.argv[1], Echo(), patience=float(sys.argv[2])).start()
    print("serving", flush=True)
    time.sleep(3600)
