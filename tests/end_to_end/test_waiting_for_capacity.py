"""`create_model(..., wait_for_capacity=)` on a service whose ranks are all taken."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors, optim


@pytest.fixture(scope="module")
def small() -> Iterator[gradwire.Client]:
    """A client of a service for one rank."""
    with gradwire.launch(workers=1, spare_ranks=1, timeout=30.0) as client:
        yield client


@pytest.fixture
def first(small: gradwire.Client) -> Iterator[gradwire.Model]:
    """The model that has the rank."""
    yield create(small, "first")
    for info in small.list_models():
        small.get_model(info.id).delete()


def create(client: gradwire.Client, model_id: str, **how: Any) -> gradwire.Model:
    example = torch.ones(2, 3), torch.ones(2, 1)
    return client.create_model(
        nn.Linear(3, 1), loss="mse_loss", optimizer=optim.SGD(lr=0.1), example=example, model_id=model_id, **how
    )


def test_it_waits_says_for_what_and_trains_when_ranks_are_free(
    small: gradwire.Client, first: gradwire.Model, caplog: pytest.LogCaptureFixture
) -> None:
    threading.Timer(2.5, first.delete).start()
    with caplog.at_level(logging.WARNING, "gradwire"):
        began = time.monotonic()
        second = create(small, "second", wait_for_capacity=20.0)
    assert time.monotonic() - began > 2.0
    assert caplog.messages == ["models/second waits for 1 workers; 0 of the service's 1 are free"]
    assert second.train_step(torch.ones(2, 3), torch.ones(2, 1)).step == 1


def test_the_timeout_counts_from_when_the_wait_is_over(small: gradwire.Client, first: gradwire.Model) -> None:
    threading.Timer(2.0, first.delete).start()
    with gradwire.connect(small.target, timeout=1.5) as hurried:
        assert create(hurried, "second", wait_for_capacity=20.0).info().state == "ready"


def test_who_waits_in_vain_or_not_at_all_hears_the_numbers(small: gradwire.Client, first: gradwire.Model) -> None:
    for seconds in (0.0, 0.3):
        with pytest.raises(errors.ResourceExhausted, match=r"1 workers; 0 of the service's 1 are free") as caught:
            create(small, "second", wait_for_capacity=seconds)
        assert caught.value.reason == "WORKERS_EXHAUSTED"
    with pytest.raises(errors.InvalidArgument, match="wait_for_capacity"):
        create(small, "second", wait_for_capacity=-1)
    assert [info.id for info in small.list_models()] == ["first"]


def test_ctrl_c_gives_the_wait_up_and_leaves_nothing(small: gradwire.Client, first: gradwire.Model) -> None:
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(errors.Interrupted):
        create(small, "second", wait_for_capacity=60.0)
    assert [info.id for info in small.list_models()] == ["first"]
    first.delete()
    assert small.server_info().free_workers == 1
