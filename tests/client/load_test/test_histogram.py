"""Latencies are kept to three digits, whatever they are: compared with numpy on the latencies themselves."""

from __future__ import annotations

import numpy as np
import pytest

from gradwire.load_test.histogram import Histogram

PERCENTS = (0.1, 1, 10, 50, 90, 95, 99, 99.9, 100)


def latencies(seed: int, count: int = 4999) -> np.ndarray:
    """From microseconds to minutes. Not 5,000, of which numpy takes 99.9% for a little more than 4,995."""
    return np.exp(np.random.default_rng(seed).normal(9, 3, count)).astype(np.int64)


@pytest.mark.parametrize("seed", range(3))
def test_percentiles_are_numpys_to_three_digits(seed: int) -> None:
    values = latencies(seed)
    histogram = Histogram(values.tolist())
    for percent in PERCENTS:
        exact = np.percentile(values, percent, method="inverted_cdf")
        assert histogram.percentile(percent) == pytest.approx(exact, rel=1e-3), percent


def test_short_latencies_mean_and_extremes_are_exact() -> None:
    values = np.random.default_rng(0).integers(0, 2048, 999)
    histogram = Histogram(values.tolist())
    for percent in PERCENTS:
        assert histogram.percentile(percent) == np.percentile(values, percent, method="inverted_cdf")
    long = latencies(1)
    histogram = Histogram(long.tolist())
    assert (histogram.mean, histogram.highest, histogram.lowest) == (long.mean(), long.max(), long.min())


def test_percentile_of_a_whole_rank_is_that_rank() -> None:
    histogram = Histogram(range(1, 1001))
    assert [histogram.percentile(percent) for percent in (0.1, 7, 50, 99, 99.9)] == [1, 70, 500, 990, 999]


def test_merged_histograms_are_one_of_all_latencies() -> None:
    parts = [latencies(seed, 300) for seed in range(4)]
    merged = Histogram.merged(Histogram(part.tolist()) for part in parts)
    whole = Histogram(np.concatenate(parts).tolist())
    assert list(merged) == list(whole)
    assert (merged.count, merged.total, merged.lowest) == (whole.count, whole.total, whole.lowest)


def test_a_hundred_thousand_latencies_take_a_few_thousand_numbers() -> None:
    histogram = Histogram(latencies(0, 100_000).tolist())
    assert len(list(histogram)) < 20_000
    assert sum(count for _, count in histogram) == 100_000


def test_nothing_recorded_has_no_percentile() -> None:
    assert (Histogram().percentile(50), Histogram().mean) == (None, None)
