"""Datasets and fits, as messages and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwire_proto import codec
from gradwire_proto.errors import DatasetNotFound, FailedPrecondition, GradwireError, InvalidArgument
from gradwire_proto.names import dataset_name, parse_dataset_name
from gradwire_proto.status import from_status, to_status
from gradwire_proto.values import DatasetInfo, FitPlan, FitProgress, FitSteps, TensorData, Timing

INFO = DatasetInfo(
    id="digits-2",
    inputs={"x": (TensorData("float32", (3, 2), b""), [TensorData("int64", (3,), b"")]), "scale": 1.5},
    targets=TensorData("bool", (3, 0), b""),
    num_examples=3,
    nbytes=48,
    created_at=12.5,
)
PLAN = FitPlan(dataset="d", epochs=2)
SEVENTH = "7" * 8 + "-7777-4777-8777-" + "7" * 12


def test_dataset_keeps_types_and_shapes_and_has_no_bytes():
    assert codec.decode_dataset(codec.encode_dataset(INFO)) == INFO
    without = replace(INFO, targets=None)
    assert codec.decode_dataset(codec.encode_dataset(without)) == without


@given(
    st.builds(
        FitPlan,
        dataset=st.just("d"),
        epochs=st.integers(1, 1 << 40),
        batch_size=st.none() | st.integers(1, 1 << 40),
        shuffle=st.booleans(),
        seed=st.integers(-(1 << 63), 1 << 62),
        validation=st.none() | st.just("v"),
        completed_steps=st.integers(0, 1 << 40),
        stop=st.booleans(),
    )
)
def test_plan_comes_back(plan):
    assert codec.decode_fit_plan(codec.encode_fit_plan(plan, "m", SEVENTH)) == plan


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"completed_steps": -1}, "completed_steps"),
        ({"shuffle": True, "seed": (1 << 63) - 2}, "seed"),
        ({"dataset": "d"}, "dataset"),
        ({"validation_dataset": "models/v"}, "validation_dataset"),
        ({"request_id": ""}, "request_id"),
    ],
)
def test_plan_that_cannot_be_one_is_refused_by_its_field(changes: dict[str, Any], field: str):
    request = codec.encode_fit_plan(PLAN, "m", SEVENTH)
    for name, value in changes.items():
        setattr(request, name, value)
    with pytest.raises(InvalidArgument) as caught:
        codec.decode_fit_plan(request)
    assert caught.value.field == field


def test_steps_and_progress_come_back():
    steps = FitSteps(
        fit="f", dataset=INFO, first_step=7, steps=3, batch_size=2, seed=0, rows=b"rows", validation_loss=0.0
    )
    assert codec.decode_fit_steps(codec.encode_fit_steps(steps, "m", SEVENTH)) == steps
    progress = FitProgress(first_step=7, losses=(0.1, float("inf")), step=9, epoch=1, timing=Timing(compute=0.5))
    assert codec.decode_fit_progress(codec.encode_fit_progress(progress)) == progress
    last = FitProgress(first_step=9, validation_loss=0.0, done=True)
    assert codec.decode_fit_progress(codec.encode_fit_progress(last)) == last


def test_name_of_a_dataset_is_told_from_others():
    assert parse_dataset_name(dataset_name("d-1")) == "d-1"
    with pytest.raises(InvalidArgument):
        parse_dataset_name("models/d")
    with pytest.raises(DatasetNotFound) as caught:
        parse_dataset_name("datasets/D")
    assert caught.value.resource == "datasets/D"


def test_error_survives_as_a_status():
    error = FailedPrecondition("no", reason="NO_LOSS", field="dataset", outcome="applied", resource="datasets/d")
    again = from_status(to_status(error))
    assert type(again) is FailedPrecondition and again.attributes() == error.attributes()
    assert isinstance(from_status(to_status(GradwireError("what"))), GradwireError)
