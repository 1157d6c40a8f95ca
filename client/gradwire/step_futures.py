"""Steps whose futures are there already: several are on their way at once, and each has its own result or error."""

from __future__ import annotations

from collections import deque

from gradwire.errors import GradwireError
from gradwire.exchange import Exchange
from gradwire.futures import Future
from gradwire.rpc import Rpc
from gradwire.step_pipeline import StepPipeline
from gradwire_proto.values import StepResult

MOST_IN_FLIGHT = 64
"""Steps that are unanswered at once, at most: those behind them can still be cancelled."""


class StepFutures:
    """See the module. All but `wake` belong to one thread."""

    def __init__(self, rpc: Rpc) -> None:
        self._pipeline = StepPipeline(rpc)
        self._futures: deque[Future[StepResult]] = deque()

    def __len__(self) -> int:
        """Steps whose futures are not done."""
        return len(self._futures)

    @property
    def has_room(self) -> bool:
        """Whether another may be sent now."""
        return len(self._futures) < MOST_IN_FLIGHT

    def add(self, future: Future[StepResult], step: Exchange) -> None:
        """Send a step, whose future runs, behind the others, at the next `advance`."""
        self._futures.append(future)
        self._pipeline.add(step)

    def advance(self) -> None:
        """Wait until something became of the first steps, or `wake` is called."""
        try:
            results = self._pipeline.results(wakes=True)
        except GradwireError as error:
            # Those behind it were refused for that reason alone, and are calls of their own.
            self._pipeline.skip()
            self._futures.popleft().set_exception(error)
            return
        except BaseException as error:
            self._pipeline.cancel()
            while self._futures:
                self._futures.popleft().set_exception(error)
            return
        for result in results:
            self._futures.popleft().set_result(result)

    def drain(self) -> None:
        """Wait until all futures are done."""
        while self._futures:
            self.advance()

    def wake(self) -> None:
        """Another step waits: `advance` returns. Any thread may call it."""
        self._pipeline.wake()

    def close(self) -> None:
        """End the stream; nothing is on its way."""
        self._pipeline.cancel()
