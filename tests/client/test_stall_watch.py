"""Streams that stand still are cancelled when their patience ends, no earlier and not much later."""

from __future__ import annotations

import time

from gradwire.stall_watch import StallWatch


def test_patience_counts_from_the_last_item():
    cancelled: list[float] = []
    with StallWatch(0.5, lambda: cancelled.append(time.monotonic())) as watch:
        items = watch.over(range(3))
        for _ in range(2):
            time.sleep(0.3)
            next(items)
        last = time.monotonic()
        while not cancelled and time.monotonic() - last < 3:
            time.sleep(0.005)
    assert watch.stalled and 0.49 <= cancelled[0] - last < 0.75


def test_whoever_has_what_came_in_may_keep_it_longer_than_the_patience():
    cancelled: list[float] = []

    def items():
        yield
        asked = time.monotonic()
        while not cancelled and time.monotonic() - asked < 3:
            time.sleep(0.005)
        yield asked

    with StallWatch(0.3, lambda: cancelled.append(time.monotonic())) as watch:
        coming = watch.coming(items())
        next(coming)
        time.sleep(0.7)
        assert not watch.stalled
        asked = next(coming)
    assert watch.stalled and 0.29 <= cancelled[0] - asked < 0.55


def test_stream_that_moves_may_take_longer_than_the_patience():
    with StallWatch(0.3, lambda: None) as watch:
        for _ in watch.over(range(5)):
            time.sleep(0.1)
    assert not watch.stalled
