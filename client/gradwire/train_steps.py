"""Training over an iterable of batches, with steps on their way before those ahead of them are answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from gradwire.arguments import wrong_type
from gradwire.errors import Interrupted
from gradwire.exchange import Exchange
from gradwire.futures import CallQueue
from gradwire.rpc import Rpc
from gradwire.step_pipeline import StepPipeline
from gradwire.step_requests import StepRequests
from gradwire_proto.values import StepResult

_OVER = object()

_INTERRUPT_PATIENCE = 5.0
"""Seconds that Ctrl-C waits to learn how many steps were applied. A second Ctrl-C ends the wait."""


def train_steps(
    rpc: Rpc, requests: StepRequests, calls: CallQueue, batches: Iterator[Any], in_flight: int
) -> Generator[StepResult]:
    """See `Model.train_steps`. calls: the other calls of the model."""
    pipeline = StepPipeline(rpc)
    ready: deque[StepResult] = deque()
    failure: BaseException | None = None
    is_over = has_calls = False
    given = 0

    def drain() -> None:
        try:
            while len(pipeline):
                ready.extend(pipeline.results())
        except Exception:
            # It ends the training, after the results of the steps before it.
            pipeline.cancel()
            raise

    def settle() -> None:
        nonlocal failure, is_over, has_calls
        has_calls = True
        try:
            drain()
        except Exception as error:
            failure, is_over = error, True

    try:
        calls.wait()
        while True:
            try:
                # Of results that wait for the loop, neither, where its body makes calls.
                while not is_over and len(pipeline) < in_flight and len(ready) < in_flight:
                    batch = next(batches, _OVER)
                    if batch is _OVER:
                        is_over = True
                    else:
                        step = _step(requests, batch, drain)
                        pipeline.add(step)
            except Exception as error:
                failure, is_over = error, True
            pipeline.flush()
            if not ready and len(pipeline):
                ready.extend(pipeline.results())
            if not ready:
                break
            result = ready.popleft()
            given += 1
            with calls.behind(settle):
                yield result
            if has_calls:
                # Futures that the loop's body has made come before the steps that are not sent yet.
                calls.wait()
                has_calls = False
    except GeneratorExit:
        pipeline.finish()
        raise
    except KeyboardInterrupt:
        raise _interrupted(pipeline, given) from None
    finally:
        pipeline.cancel()
    if failure is not None:
        raise failure


def _interrupted(pipeline: StepPipeline, given: int) -> Interrupted:
    """given: how many results the loop has."""
    is_known = pipeline.interrupt(_INTERRUPT_PATIENCE)
    count = pipeline.applied
    words = f"{count} steps were applied" if is_known else f"at least {count} steps were applied"
    outcome = "unknown" if not is_known else "applied" if count else "not_applied"
    return Interrupted(f"interrupted: {words}, {count - given} of them behind the last result", outcome=outcome)


def _step(requests: StepRequests, batch: Any, before_variant: Callable[[], None]) -> Exchange:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        raise wrong_type(batch, "batches", "pairs of inputs and targets")
    return requests.make(batch[0], batch[1] if len(batch) == 2 else None, before_variant=before_variant, owned=True)
