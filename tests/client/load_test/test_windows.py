"""A level is believed when its last three windows agree, in throughput and in latency."""

from __future__ import annotations

import pytest
from client.load_test.made_up_levels import level, window

from gradwire.load_test.loads import Load
from gradwire.load_test.windows import Recorder, is_stable

STEADY = window([10.0] * 100)


@pytest.mark.parametrize(
    ("last", "stable"),
    [
        (window([10.0] * 110), True),
        (window([10.0] * 125), False),  # more answers
        (window([10.0] * 80), False),  # fewer
        (window([11.0] * 100), True),
        (window([13.0] * 100), False),  # slower ones
        (window([], TIMEOUT=100), False),  # none
    ],
)
def test_three_windows_within_a_tenth_of_their_mean_are_stable(last, stable: bool) -> None:
    assert is_stable([STEADY, STEADY, last], 0.1, None) is stable


def test_two_windows_are_too_few_and_early_ones_do_not_count() -> None:
    assert not is_stable([STEADY, STEADY], 0.1, None)
    assert is_stable([window([90.0]), STEADY, STEADY, STEADY], 0.1, None)
    assert not is_stable([STEADY, STEADY, STEADY, window([90.0])], 0.1, None)


def test_percentile_decides_where_one_is_named() -> None:
    # The same mean, another tail.
    even, uneven = window([20.0] * 100), window([10.0] * 90 + [110.0] * 10)
    assert is_stable([even, uneven, even], 0.1, None)
    assert not is_stable([even, uneven, even], 0.1, 99)


def test_notes_tell_a_tester_that_was_late_or_busy_and_a_service_that_does_not_keep_up() -> None:
    concurrency, rate = Load("concurrency", 4), Load("rate", 100)
    assert level(concurrency, [STEADY]).notes == ()
    assert level(rate, [STEADY]).notes == ()
    assert level(rate, [window([10.0] * 100, lag=5.0)]).notes == ("tester late",)
    assert level(rate, [window([1.0] * 100, lag=0.5)]).notes == ()
    assert level(concurrency, [window([10.0] * 100, cpu=0.95)]).notes == ("tester busy",)
    assert level(rate, [window([10.0] * 90)]).notes == ("below the rate",)
    assert level(concurrency, [STEADY], stable=False).notes == ("unstable",)


def test_parts_of_a_request_sum_to_its_mean() -> None:
    split = level(Load("rate", 100), [window([10.0] * 100)]).split_ms
    assert (split["queue"], split["compute"], split["other"], split["outside"]) == pytest.approx((1, 2, 1, 6))
    assert sum(split.values()) == pytest.approx(10)


def test_requests_that_were_not_sent_have_no_part_in_where_the_time_went() -> None:
    answered = window([10.0] * 100)
    recorder = Recorder(lambda reply: None)
    recorder.unsent(3_000_000_000, 100)
    found = level(Load("rate", 400), [answered, recorder.window])
    assert found.split_ms == level(Load("rate", 400), [answered]).split_ms
    assert (found.measured.answered, found.measured.unsent) == (100, 301)
    assert "not sent" in found.notes
