"""What a fit says was applied, where its connection breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client.one_model import batch, net

import gradwire
from gradwire import optim
from gradwire.errors import GradwireError, InvalidArgument, Unavailable
from gradwire_proto import codec
from gradwire_proto.status import abort_arguments
from gradwire_proto.v1.dataset_pb2 import FitResponse
from gradwire_proto.values import DatasetInfo, FitProgress


@pytest.fixture
def fitted(scripted, hosted) -> Iterator[Callable[[], GradwireError]]:
    """The error of a fit of 5 steps whose service answers Fit as the test says."""

    def create(request: Any, context: Any) -> Any:
        sent = codec.decode_batch(request.batch, "batch")
        info = DatasetInfo(
            id="own", inputs=sent.inputs, targets=sent.targets, num_examples=6, nbytes=120, created_at=1.0
        )
        return codec.encode_dataset(info)

    scripted.answers["CreateDataset"] = create
    with gradwire.connect(scripted.target, timeout=1) as sdk:
        made = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())
        dataset = sdk.upload_dataset(*batch())

        def fit() -> GradwireError:
            with pytest.raises(GradwireError) as caught:
                made.fit(dataset, epochs=5)
            return caught.value

        yield fit


def told(first: int) -> FitResponse:
    return codec.encode_fit_progress(FitProgress(first_step=first, losses=(0.5,), step=first + 1, epoch=first))


def abort(context: Any, error: GradwireError) -> None:
    code, details, metadata = abort_arguments(error)
    context.set_trailing_metadata(metadata)
    context.abort(code, details)


@pytest.mark.parametrize("count", [0, 2])
def test_steps_of_a_fit_whose_service_died_may_have_been_applied(fitted, scripted, count):
    def answer(request, context):
        yield from map(told, range(count))
        threading.Thread(target=scripted.stop, daemon=True).start()
        time.sleep(0.3)

    scripted.answers["Fit"] = answer
    error = fitted()
    assert (error.reason, error.outcome) == ("NOT_CONNECTED", "unknown")
    assert f"at least {count} steps of the fit were applied" in error.message


def test_a_fit_that_came_back_and_was_refused_knows_how_many_steps_were_applied(fitted, scripted):
    def answer(request, context):
        yield told(request.completed_steps)
        if not request.completed_steps:
            abort(context, Unavailable("cut", reason="CONNECTION_LOST"))
        abort(context, InvalidArgument("no", field="batch", reason="NO"))

    scripted.answers["Fit"] = answer
    error = fitted()
    assert (error.reason, error.outcome) == ("NO", "applied")
    assert error.message.endswith("; 2 steps of the fit were applied")
