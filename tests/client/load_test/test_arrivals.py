"""When requests are due: at the rate that was asked for, the same times for the same seed."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from gradwire.load_test.arrivals import due_times


def first(count: int, rate: float, kind: str, seed: int = 0) -> np.ndarray:
    return np.array(list(islice(due_times(rate, kind, seed), count)))


def test_constant_arrivals_are_one_period_apart_and_do_not_drift() -> None:
    times = first(30_001, 30.0, "constant")
    assert times[0] == 0
    assert times[-1] == 1000.0
    assert np.allclose(np.diff(times), 1 / 30, rtol=1e-6)


def test_poisson_arrivals_come_at_the_rate_independently_of_each_other() -> None:
    gaps = np.diff(first(20_001, 200.0, "poisson"))
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.03)
    # Of exponential gaps: as much spread as mean, and no gap tells the next.
    assert gaps.std() == pytest.approx(1 / 200, rel=0.05)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03


def test_poisson_arrivals_repeat_with_their_seed_alone() -> None:
    assert (first(100, 5.0, "poisson", seed=1) == first(100, 5.0, "poisson", seed=1)).all()
    assert (first(100, 5.0, "poisson", seed=1) != first(100, 5.0, "poisson", seed=2)).all()
