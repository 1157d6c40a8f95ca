"""A history of four clients' calls on one model, under faults, is one of calls made one after another."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Hashable, Iterator
from typing import Any

import pytest
import torch
from chaos.faults import Faults
from chaos.linearizability import Operation, is_linearizable
from cutting_proxy import CuttingProxy
from torch import nn

import gradwire
from gradwire import optim
from gradwire.errors import GradwireError


def register(state: Hashable, operation: Operation) -> tuple[Hashable, Any]:
    """A number that is written, read, and added to."""
    if operation.kind == "write":
        return operation.argument, None
    if operation.kind == "add":
        return state + operation.argument, None  # pyright: ignore[reportOperatorIssue]
    return state, state


def op(kind: str, argument: Any, answer: Any, begin: float, end: float = math.inf) -> Operation:
    return Operation(kind=kind, argument=argument, answer=answer, begin=begin, end=end)


def test_reads_that_overlap_a_write_may_see_either_value() -> None:
    history = [op("write", 1, None, 0, 10), op("read", None, 0, 1, 2), op("read", None, 1, 3, 4)]
    assert is_linearizable(history, 0, register)


def test_a_read_that_goes_back_in_time_is_found() -> None:
    history = [op("write", 1, None, 0, 10), op("read", None, 1, 1, 2), op("read", None, 0, 3, 4)]
    assert not is_linearizable(history, 0, register)


def test_a_write_that_is_lost_is_found() -> None:
    assert not is_linearizable([op("write", 1, None, 0, 1), op("read", None, 0, 2, 3)], 0, register)


def test_an_addition_that_happened_twice_is_found() -> None:
    assert not is_linearizable([op("add", 1, None, 0, 1), op("read", None, 2, 2, 3)], 0, register)


def test_a_call_without_an_answer_may_have_happened_late_or_never() -> None:
    late = [op("write", 1, None, 0), op("read", None, 0, 1, 2), op("read", None, 1, 3, 4)]
    never = [op("write", 1, None, 0), op("read", None, 0, 1, 2), op("read", None, 0, 3, 4)]
    before = [op("read", None, 1, 0, 1), op("write", 1, None, 2)]
    assert is_linearizable(late, 0, register)
    assert is_linearizable(never, 0, register)
    assert not is_linearizable(before, 0, register)


# --- the service ------------------------------------------------------------------------------------------------------

CLIENTS = 4
CALLS = 36
State = tuple[float, int]
"""The model's one parameter, and its step counter."""


class OneNumber(nn.Module):
    """A parameter w; its loss is w times the mean of x: SGD with a rate of 1 takes that mean off w, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.w * x).mean()


def one_number(state: Any, operation: Operation) -> tuple[State, Any]:
    """What the service should do."""
    w, step = state
    if operation.kind == "train_step":
        return (w - operation.argument, step + 1), (w * operation.argument, step + 1)
    if operation.kind == "load_state_dict":
        return (operation.argument, step), None
    return state, w


@pytest.fixture(scope="module")
def own_service() -> Iterator[gradwire.Client]:
    """A service that nobody else minds being hurt."""
    with gradwire.launch(workers=2, spare_ranks=2) as client:
        yield client


@pytest.mark.timeout(240)
def test_four_clients_on_one_model_see_one_order_of_their_calls_under_faults(own_service: gradwire.Client) -> None:
    own_service.create_model(
        OneNumber(),
        optimizer=optim.SGD(lr=1.0),
        example=(torch.ones(4, 1, dtype=torch.float64),),
        workers=2,
        model_id="one",
    )
    proxy = CuttingProxy(own_service.target)
    history: list[Operation] = []
    threads = [threading.Thread(target=_call, args=(proxy.target, seed, history)) for seed in range(CLIENTS)]
    faults = Faults(proxy, lambda: True, seed=2, pause=(1.0, 3.0))
    for each in (*threads, faults):
        each.start()
    try:
        for each in threads:
            each.join()
    finally:
        # They would strike the services of later tests.
        faults.stop()
    final = own_service.get_model("one").state_dict()["w"].item()
    proxy.close()
    assert len(history) == CLIENTS * CALLS
    assert len(faults.happened) >= 3
    now = time.monotonic()
    assert is_linearizable([*history, op("state_dict", None, final, now, now)], (0.0, 0), one_number)


def _call(target: str, seed: int, history: list[Operation]) -> None:
    chosen = random.Random(seed)
    with gradwire.connect(target, timeout=60.0, shared_memory=seed % 2 == 0) as client:
        model = client.get_model("one")
        for _ in range(CALLS):
            kind = chosen.choice(["train_step", "train_step", "load_state_dict", "state_dict"])
            number = float(chosen.randrange(1, 1000))
            argument = None if kind == "state_dict" else number
            begin = time.monotonic()
            answer, end = None, math.inf
            try:
                answer, end = _answer(model, kind, number), time.monotonic()
            except GradwireError as error:
                # What was not applied never happened: an operation without any effect and answer.
                if error.outcome == "not_applied":
                    kind, argument, end = "state_dict", None, math.inf
            history.append(op(kind, argument, answer, begin, end))
            time.sleep(chosen.uniform(0.0, 0.3))


def _answer(model: gradwire.Model, kind: str, number: float) -> Any:
    if kind == "train_step":
        result = model.train_step(torch.full((4, 1), number, dtype=torch.float64))
        return result.loss, result.step
    if kind == "load_state_dict":
        model.load_state_dict({"w": torch.tensor(number, dtype=torch.float64)})
        return None
    return model.state_dict()["w"].item()
