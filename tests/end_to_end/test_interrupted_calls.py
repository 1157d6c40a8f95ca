"""Calls that were cut off say what became of them, and the model's step agrees."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter

import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors, optim


@pytest.fixture
def model(client: gradwire.Client) -> gradwire.Model:
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    return client.create_model(net, loss="mse_loss", optimizer=optim.SGD(lr=1e-3), example=batch(4), workers=2)


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 64), torch.randn(rows, 8)


def settled_step(model: gradwire.Model) -> int:
    """The model's step once nothing of it runs any more: reads wait for their turn."""
    model.compute_gradients(*batch(2), wrt=())
    return model.info().step


def test_steps_cut_off_by_their_deadline_are_applied_wholly_or_not_as_they_say(client, model):
    model.train_step(*batch(512))  # what is slow once
    before, outcomes, late = settled_step(model), Counter[str](), []
    with gradwire.connect(client.target) as hurried_client:
        hurried = hurried_client.get_model(model.id)
        for _ in range(30):
            # Shorter than connecting may take, so that it is set only now.
            timeout = hurried_client._rpc.timeout = 0.002 + 0.02 * torch.rand(()).item()
            start = time.monotonic()
            try:
                hurried.train_step(*batch(512))
                outcomes["applied"] += 1
            except (errors.DeadlineExceeded, errors.Unavailable) as error:
                outcomes[error.outcome] += 1
            late.append(time.monotonic() - start - timeout)
    steps = settled_step(model) - before
    assert outcomes["applied"] <= steps <= outcomes["applied"] + outcomes["unknown"], outcomes
    assert sum(outcomes.values()) == 30
    assert max(late) < 1.0


def test_ctrl_c_in_a_step_leaves_the_model_at_the_step_that_the_interrupt_tells(model):
    returned, outcomes = 0, list[str]()
    inputs = batch(2048)
    deadline = time.monotonic() + 30
    # Now and then it comes between two calls, where it says nothing of a command.
    while len(outcomes) < 3 and time.monotonic() < deadline:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                model.train_step(*inputs)
                returned += 1
        except errors.Interrupted as interrupt:
            outcomes.append(interrupt.outcome)
        except KeyboardInterrupt:
            pass
        assert set(outcomes) <= {"applied", "not_applied"}
        assert settled_step(model) == returned + outcomes.count("applied")
    assert len(outcomes) == 3
    assert model.train_step(*inputs).step == returned + outcomes.count("applied") + 1
