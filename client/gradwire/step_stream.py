"""One stream of training steps to the service: what is sent goes out from a thread, what comes back waits here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any

from gradwire.errors import GradwireError, Unavailable
from gradwire.rpc import Rpc
from gradwire_proto.encoding.repeated_bytes import join_items

PACKED_BYTES = 1 << 20
"""Steps that wait together go in one message of about so many bytes at most."""

PACKED_STEPS = 1024
"""And of so many steps. The service takes four times as many."""


class StepStream:
    """See the module. Ended by `cancel`, or by `finish` and the service's answers to all that was sent."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = rpc.converse("TrainSteps", iter(self._outbox.get, None))
        threading.Thread(target=self._read, name="gradwire-steps", daemon=True).start()

    def send(self, bodies: Sequence[bytes]) -> None:
        """Send the requests of the next steps, as few messages as can be."""
        first, nbytes = 0, 0
        for index, body in enumerate(bodies):
            if index - first == PACKED_STEPS or (index > first and nbytes + len(body) > PACKED_BYTES):
                self._outbox.put(join_items(bodies[first:index]))
                first, nbytes = index, 0
            nbytes += len(body)
        self._outbox.put(join_items(bodies[first:]))

    def receive(self, seconds: float) -> Sequence[Any] | GradwireError | None:
        """The next outcomes; why the stream is over, where it is; None where nothing comes in so many seconds."""
        try:
            return self._inbox.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            return None

    def wake(self) -> None:
        """Have `receive` give no outcomes at once. Any thread may call it."""
        self._inbox.put(())

    def finish(self) -> None:
        """Send no more."""
        self._outbox.put(None)

    def cancel(self) -> None:
        """End it. What was sent and has not been begun will not be."""
        self.finish()
        # Not here: see `Rpc._break_off`.
        threading.Thread(target=self._call.cancel, name="gradwire-cancel", daemon=True).start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._inbox.put(response.outcomes)
            self._inbox.put(Unavailable("the service ended the stream", reason="CONNECTION_LOST"))
        except Exception as error:
            lost = self._rpc.lost(error) or Unavailable(f"the stream broke: {error}", reason="CONNECTION_LOST")
            self._inbox.put(lost)
        self._outbox.put(None)
