"""Training over an iterable of batches, with steps on their way before those ahead of them are answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from gradwire.arguments import wrong_type
from gradwire.exchange import Exchange
from gradwire.futures import CallQueue
from gradwire.rpc import Rpc
from gradwire.step_pipeline import StepPipeline
from gradwire.step_requests import StepRequests
from gradwire_proto.values import StepResult

_OVER = object()


def train_steps(
    rpc: Rpc, requests: StepRequests, calls: CallQueue, batches: Iterator[Any], in_flight: int
) -> Generator[StepResult]:
    """See `Model.train_steps`. calls: the other calls of the model."""
    pipeline = StepPipeline(rpc)
    ready: deque[StepResult] = deque()
    failure: BaseException | None = None
    is_over = False

    def drain() -> None:
        try:
            while len(pipeline):
                ready.extend(pipeline.results())
        except Exception:
            # It ends the training, after the results of the steps before it.
            pipeline.cancel()
            raise

    def settle() -> None:
        nonlocal failure, is_over
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
            with calls.behind(settle):
                yield result
    except GeneratorExit:
        pipeline.finish()
        raise
    finally:
        pipeline.cancel()
    if failure is not None:
        raise failure


def _step(requests: StepRequests, batch: Any, before_variant: Callable[[], None]) -> Exchange:
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2):
        raise wrong_type(batch, "batches", "pairs of inputs and targets")
    return requests.make(batch[0], batch[1] if len(batch) == 2 else None, before_variant=before_variant, owned=True)
