"""What a fit says was applied, where its connection breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client.one_model import batch, empty, net

import gradwire
from gradwire import optim
from gradwire.errors import GradwireError, InvalidArgument, Unavailable
from gradwire_proto import codec
from gradwire_proto.status import abort_arguments
from gradwire_proto.v1.dataset_pb2 import FitResponse
from gradwire_proto.values import DatasetInfo, FitProgress


def describe(request: Any, context: Any) -> Any:
    sent = codec.decode_batch(request.batch, "batch")
    info = DatasetInfo(id="own", inputs=sent.inputs, targets=sent.targets, num_examples=6, nbytes=120, created_at=1.0)
    return codec.encode_dataset(info)


@pytest.fixture
def sdk(scripted, hosted) -> Iterator[gradwire.Client]:
    """Waits for a second. Its service takes datasets."""
    scripted.answers |= {"CreateDataset": describe, "DeleteDataset": lambda request, context: empty()}
    with gradwire.connect(scripted.target, timeout=1) as sdk:
        yield sdk


@pytest.fixture
def model(sdk) -> gradwire.Model:
    return sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(lr=0.5), example=batch())


@pytest.fixture
def fitted(sdk, model) -> Callable[[], GradwireError]:
    """The error of a fit of 5 steps whose service answers Fit as the test says."""
    dataset = sdk.upload_dataset(*batch())

    def fit() -> GradwireError:
        with pytest.raises(GradwireError) as caught:
            model.fit(dataset, epochs=5)
        return caught.value

    return fit


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


def test_validation_may_take_longer_than_the_timeout_each_time_that_it_begins_anew(model, scripted):
    begun: list[int] = []

    def answer(request, context):
        begun.append(request.completed_steps)
        if len(begun) == 1:
            yield told(0)
        elif len(begun) == 2:
            for _ in range(4):
                time.sleep(0.3)
                yield codec.encode_fit_progress(FitProgress(first_step=1, epoch=0))
        else:
            yield codec.encode_fit_progress(FitProgress(first_step=1, epoch=0, validation_loss=2.0, done=True))
            return
        abort(context, Unavailable("cut", reason="CONNECTION_LOST"))

    scripted.answers["Fit"] = answer
    heard: list[gradwire.FitStatus] = []
    result = model.fit(batch(), epochs=1, validation=batch(), callbacks=[heard.append])
    assert begun == [0, 1, 1] and result.validation_losses == (2.0,)
    # That a validation goes on is no news to callbacks.
    assert [(status.losses, status.validation_loss) for status in heard] == [((0.5,), None), ((), 2.0)]


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ("dataset", "data"),
        ("dataset.targets", "data.targets"),
        ("validation_dataset.inputs[0]", "validation.inputs[0]"),
        ("validation_dataset", "validation"),
        ("datasets", "datasets"),
        ("epochs", "epochs"),
    ],
)
def test_what_a_service_refuses_is_named_as_the_argument_that_it_comes_from(fitted, scripted, sent, named):
    def answer(request, context):
        yield told(0)
        abort(context, InvalidArgument("no", field=sent, reason="NO"))

    scripted.answers["Fit"] = answer
    assert fitted().field == named


def test_data_and_validation_that_cannot_be_brought_are_told_apart(model, scripted):
    (x, y), failing = batch(), 1

    def create(request, context):
        if len(scripted.requests("CreateDataset")) == failing:
            abort(context, InvalidArgument("no rows", field="batch.targets", reason="DATASET_ROWS"))
        return describe(request, context)

    def field_of(data: Any, validation: Any) -> str | None:
        with pytest.raises(InvalidArgument) as caught:
            model.fit(data, epochs=1, validation=validation)
        return caught.value.field

    scripted.answers["CreateDataset"] = create
    assert field_of((x, y), (x, y)) == "data.targets"
    failing = 3
    assert field_of((x, y), (x, y)) == "validation.targets"
    assert field_of((x, object()), None) == "data.targets"
    assert field_of((x, y), (x, object())) == "validation.targets"
    # Of other features than the model takes.
    assert field_of((x[:, :2], y), None) == "data.inputs"
    assert field_of((x, y), (x[:, :2], y)) == "validation.inputs"


def test_dataset_of_one_fit_goes_by_itself_should_its_client_be_killed(model, scripted, hosted):
    done = codec.encode_fit_progress(FitProgress(first_step=1, done=True))
    scripted.answers["Fit"] = lambda request, context: iter([done])
    model.fit(batch(), epochs=1)
    with gradwire.connect(scripted.target, timeout=1000) as sdk:
        sdk.get_model(model.id).fit(batch(), epochs=1)
        sdk.upload_dataset(*batch())
    requests = scripted.requests("CreateDataset")
    # One that comes back within its timeout finds it.
    assert [each.ttl.ToSeconds() for each in requests if each.HasField("ttl")] == [600, 2000]
    assert not requests[2].HasField("ttl")


@pytest.mark.parametrize("cut", [False, True])
def test_a_callback_may_take_longer_than_the_timeout(sdk, model, scripted, cut):
    calls = []

    def answer(request, context):
        calls.append(request.completed_steps)
        if not request.completed_steps:
            yield told(0)
            yield codec.encode_fit_progress(FitProgress(first_step=1, epoch=0, validation_loss=2.0))
            if cut:
                abort(context, Unavailable("cut", reason="CONNECTION_LOST"))
        yield codec.encode_fit_progress(FitProgress(first_step=1, epoch=0, done=True))

    scripted.answers["Fit"] = answer
    slow = lambda status: time.sleep(1.3) if status.validation_loss is not None else None  # noqa: E731
    result = model.fit(batch(), epochs=1, validation=batch(), callbacks=[slow])
    assert (result.steps, result.validation_losses, calls) == (1, (2.0,), [0, 1] if cut else [0])
