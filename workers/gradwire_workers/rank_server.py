"""A rank's end of the hot path: one thread takes commands from a frontend and answers them, one after another.

Nothing here polls. A second thread sleeps on the connection and ends the process when the frontend is gone: a rank
that lost its group must not linger, whatever it is computing.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import zmq
from zmq.utils.monitor import recv_monitor_message

from gradwire_proto.errors import GradwireError, InternalError
from gradwire_workers.command_sockets import CommandSockets
from gradwire_workers.frames import Frame, pack, unpack
from gradwire_workers.rank_channel import encode_error
from gradwire_workers.step_rows import RowsPart, StepRow, encode_part

logger = logging.getLogger(__name__)


class Commands(Protocol):
    """What a rank does with a command: its fields in, the fields of the answer out, or its rows one after another."""

    def answer(self, kind: str, fields: Mapping[str, Any]) -> Mapping[str, Any] | Iterator[StepRow]: ...

    @property
    def needs_rejoin(self) -> bool: ...


class RankServer:
    """Serves one frontend at `endpoint`. Ends the process when the frontend disconnects, or does not come in time."""

    def __init__(self, endpoint: str, commands: Commands, *, patience: float) -> None:
        self._commands = commands
        self._patience = patience
        self._steps_failed = False
        """Whether the last steps that came together ended with an error."""
        self._sockets = CommandSockets(endpoint)
        self._monitor = self._sockets.monitor

    def start(self) -> None:
        """Serves from now on, in threads of its own."""
        threading.Thread(target=self._serve, name="gradwire-serve", daemon=True).start()
        threading.Thread(target=self._watch, name="gradwire-watch", daemon=True).start()

    def _serve(self) -> None:
        try:
            while True:
                self._serve_one()
        except BaseException:
            logger.exception("the rank cannot go on")
        finally:
            # A rank that answers no more must be seen to be lost.
            os._exit(1)

    def _serve_one(self) -> None:
        frames = self._sockets.receive()
        started = time.perf_counter()
        message = unpack(frames)

        def packed(reply: Mapping[str, Any]) -> list[Frame]:
            return pack({**reply, "call": message["call"], "busy": time.perf_counter() - started})

        if message["kind"] == "train_steps":
            self._serve_rows(message, packed, started)
            return
        self._sockets.send(self._reply(message["kind"], message["fields"], packed))

    def _reply(
        self, kind: str, fields: Mapping[str, Any], packed: Callable[[Mapping[str, Any]], list[Frame]]
    ) -> list[Frame]:
        outcome = "not_applied"
        try:
            result = self._commands.answer(kind, fields)
            # From here on the command is done, whatever becomes of its answer.
            outcome = "applied"
            return packed({"result": result})
        except GradwireError as error:
            failure = error
        except Exception as error:
            logger.exception("the command %s failed", kind)
            failure = InternalError(f"{type(error).__name__}: {error}", outcome=outcome)
        return packed({"error": encode_error(failure), "needs_rejoin": self._commands.needs_rejoin})

    def _serve_rows(
        self, message: Mapping[str, Any], packed: Callable[[Mapping[str, Any]], list[Frame]], started: float
    ) -> None:
        """Answer a command with its rows, in parts: one when `part_seconds` have passed since the last, and one behind
        row number `part_row`; both are its fields. The last part says that it is over; an error comes behind all parts.

        One that `follows` on the command before, and was sent before that one was over, is refused where it failed.
        """
        kind, fields = message["kind"], message["fields"]
        rows: list[StepRow] = []
        sent = time.perf_counter()

        def tell(*, is_over: bool) -> None:
            part = RowsPart(message["call"], is_over, time.perf_counter() - started, rows)
            self._sockets.send([encode_part(part)])

        ending: dict[str, Any] = {}
        try:
            if fields["follows"] and self._steps_failed:
                raise InternalError("a step before these failed", reason="STEP_BEFORE_FAILED", outcome="not_applied")
            for number, row in enumerate(self._commands.answer(kind, fields), start=1):
                rows.append(row)  # pyright: ignore[reportArgumentType]
                now = time.perf_counter()
                if now - sent >= fields["part_seconds"] or number == fields["part_row"]:
                    tell(is_over=False)
                    rows, sent = [], now
        except GradwireError as error:
            ending = {"error": encode_error(error), "needs_rejoin": self._commands.needs_rejoin}
        except Exception as error:
            logger.exception("the command %s failed", kind)
            failure = InternalError(f"{type(error).__name__}: {error}", outcome="not_applied")
            ending = {"error": encode_error(failure), "needs_rejoin": self._commands.needs_rejoin}
        self._steps_failed = bool(ending)
        if rows or not ending:
            tell(is_over=not ending)
        if ending:
            self._sockets.send(packed(ending))

    def _watch(self) -> None:
        if not self._monitor.poll(self._patience * 1000):
            logger.warning("no frontend came within %s s", self._patience)
            os._exit(0)
        while recv_monitor_message(self._monitor)["event"] != zmq.EVENT_DISCONNECTED:
            pass
        # Not sys.exit: the serving thread may be deep inside a collective.
        os._exit(0)
