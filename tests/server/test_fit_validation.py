"""Validations of fits, as any client would ask for them: piece by piece, and between them whatever else there is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from server.fit_requests import creation, fit, losses, told

from gradwire_proto.errors import InvalidArgument, RankLost
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_server.fit import Fit

ROWS = 98
"""25 batches of 4 rows, but for the last, which has 2. By the clock of the fakes, 5 of them take 0.1 s."""

PIECES = [(0, 1), (1, 5), (6, 5), (11, 5), (16, 5), (21, 5)]
"""The first batch and the most of them that each piece asks for, where nothing is known of their time at first."""


async def prepared(frontend: Any) -> Any:
    """The workers of a model with examples "d" to train on, and "v" to validate on."""
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    await frontend.stub.CreateDataset(creation(bytes(8 * ROWS), dataset_id="v", rows=ROWS))
    return workers


def validated(request_id: str, **how: Any) -> pb.FitRequest:
    return fit(request_id, **{"validation_dataset": "datasets/v", "epochs": 1} | how)


def pieces(workers: Any) -> list[tuple[int, int]]:
    return [call[1:] for call in workers.calls if call[0] == "evaluate"]


def before(workers: Any, position: int, act: Callable[[], Any]) -> None:
    """Have `act()` called when the piece with that first batch begins."""
    evaluate = workers.fitting.evaluate

    async def wrapped(dataset: Any, size: int, *, first: int, most: int) -> Any:
        if first == position:
            act()
        return await evaluate(dataset, size, first=first, most=most)

    workers.fitting.evaluate = wrapped


def losses_in(messages: list[pb.FitResponse]) -> list[float]:
    return [each.validation_loss for each in messages if each.HasField("validation_loss")]


async def test_validation_tells_that_it_goes_on_and_lets_others_have_their_turn(frontend: Any, fakes: Any) -> None:
    workers = await prepared(frontend)
    training: list[asyncio.Future[Any]] = []

    def train() -> None:
        if not training:
            training.append(asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a"))))

    before(workers, 6, train)
    messages, error = await told(frontend, validated(fakes.request_id(), epochs=2))
    assert error is None and messages[-1].done
    await training[0]
    asked = [call for call in workers.calls if call[0] in ("evaluate", "train_step")]
    count = [call[0] for call in asked].index("train_step")
    assert 3 <= count < len(PIECES) and pieces(workers)[: len(PIECES)] == PIECES
    # What a command in between changes counts from then on; rows count alike, also those of the last batch.
    rows = 4 * PIECES[count][0]
    expected = (rows * 103.0 + (ROWS - rows) * 104.0) / ROWS
    assert losses_in(messages) == [pytest.approx(expected, abs=1e-9), 107.0]
    silent = [each for each in messages if not each.losses and not each.HasField("validation_loss")]
    assert len(silent) == len(pieces(workers)) == 11


async def test_piece_of_a_validation_that_loses_its_ranks_is_computed_again(frontend: Any, fakes: Any) -> None:
    workers = await prepared(frontend)

    def kill() -> None:
        workers.error = RankLost("rank 0 died", outcome="unknown")

    before(workers, 11, kill)
    messages, error = await told(frontend, validated(fakes.request_id()))
    again = frontend.cluster.groups["m"]
    assert error is None and losses_in(messages) == [103.0]
    assert again is not workers and [*pieces(workers)[:-1], *pieces(again)] == PIECES
    assert pieces(workers)[-1] == pieces(again)[0]


@pytest.mark.parametrize("epochs", [1, 2])
async def test_validation_ends_between_two_pieces_when_the_fit_is_stopped(
    frontend: Any, fakes: Any, epochs: int
) -> None:
    workers = await prepared(frontend)
    request = validated(fakes.request_id(), epochs=epochs)
    running = asyncio.ensure_future(told(frontend, request))
    before(workers, 6, workers.gate.clear)
    await frontend.until(lambda: not workers.gate.is_set())
    stop = pb.FitRequest()
    stop.CopyFrom(request)
    stop.completed_steps, stop.stop = 3, True
    async with asyncio.timeout(5):
        messages, error = await told(frontend, stop)
    assert error is None and not losses(messages)
    workers.gate.set()
    messages, error = await running
    assert error is None and losses(messages) == [0.0, 1.0, 2.0]
    assert messages[-1].done == (epochs == 1) and not losses_in(messages)
    assert pieces(workers) == PIECES[:3]


@pytest.mark.parametrize("epochs", [1, 2])
async def test_validation_ends_between_two_pieces_when_the_service_drains(
    frontend: Any, fakes: Any, epochs: int
) -> None:
    workers = await prepared(frontend)

    def drain() -> None:
        for running in frontend.tenant._fits._running:
            running.draining = True

    before(workers, 6, drain)
    messages, error = await told(frontend, validated(fakes.request_id(), epochs=epochs))
    assert error is not None and (error.reason, error.retryable) == ("DRAINING", True)
    assert losses(messages) == [0.0, 1.0, 2.0] and pieces(workers) == PIECES[:3]


async def test_validation_is_not_told_of_a_model_that_another_call_of_the_fit_has_trained_on(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = await prepared(frontend)
    request = validated(fakes.request_id(), epochs=3)
    may_begin, fits = Fit._may_begin, []

    def noted(self: Fit, first: int, **how: Any) -> bool:
        fits.append(self)
        return may_begin(self, first, **how)

    monkeypatch.setattr(Fit, "_may_begin", noted)
    repeat = pb.FitRequest()
    repeat.CopyFrom(request)
    repeat.completed_steps = 3
    new: list[asyncio.Future[Any]] = []
    before(workers, 6, lambda: new or new.append(asyncio.ensure_future(told(frontend, repeat))))
    async with asyncio.timeout(5):
        messages, error = await told(frontend, request)
        again, error_again = await new[0]
    assert error is None and error_again is None and len(set(fits)) == 2
    assert losses_in(messages) == losses_in(again) == [103.0, 106.0, 109.0]
    assert losses(again) == losses(messages)[3:]


async def test_refused_validation_names_itself_and_what_stays_applied(frontend: Any, fakes: Any) -> None:
    workers = await prepared(frontend)

    def refuse() -> None:
        raise InvalidArgument("batch 7: no such class", field="batch.targets", reason="TARGET_OUT_OF_RANGE")

    before(workers, 6, refuse)
    messages, error = await told(frontend, validated(fakes.request_id(), epochs=2))
    assert error is not None and losses(messages) == [0.0, 1.0, 2.0]
    assert (error.field, error.outcome) == ("validation_dataset.targets", "applied")
    expected = "validation after epoch 0: batch 7: no such class; the 3 steps before it were applied"
    assert error.message == expected


async def test_validation_that_had_room_to_begin_goes_on_when_the_model_has_no_more_room(
    frontend: Any, fakes: Any
) -> None:
    workers = await prepared(frontend)
    queue = frontend.tenant._models._hosted["m"].commands._queue

    def fill() -> None:
        queue._limit = 0

    before(workers, 1, fill)
    messages, error = await told(frontend, validated(fakes.request_id()))
    assert error is None and losses_in(messages) == [103.0]
