"""Adaptive buckets: sizes against a search over all, who goes to the pool, following a change."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.predict import buckets as module
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.buckets import COLD, FORGOTTEN, RENEW, AdaptiveBuckets, best_sizes
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.forecaster import Forecast

BINS = LengthBins(2048, 4)


def forecast_of(median: float, spread: float = 0.05) -> Forecast:
    """A log-logistic forecast, narrow unless said otherwise."""
    with np.errstate(over="ignore"):
        curve = 1 / (1 + (BINS.edges / median) ** (1 / spread))
    curve[-1] = 0.0
    return Forecast.of(BINS, Known(1), curve)


def waste(sizes: tuple[int, ...], ends: list[float], mass: list[float]) -> float:
    return sum(
        m * (min(size for size in sizes if size >= end) - end)
        for end, m in zip(ends, mass, strict=True)
    )


@given(
    st.lists(st.just(0.0) | st.floats(FORGOTTEN, 100), min_size=1, max_size=9),
    st.integers(1, 5),
)
@settings(deadline=None)
def test_the_sizes_waste_least(mass: list[float], count: int) -> None:
    edges = BINS.edges[: len(mass) + 1] ** 2 + np.arange(len(mass) + 1)
    found = best_sizes(edges, np.array(mass), count)
    ends = [float(end) for end, m in zip(edges[1:], mass, strict=True) if m]
    if not ends:
        assert found == []
        return
    held = [m for m in mass if m]
    assert found == sorted(set(found))
    assert found[-1] == int(ends[-1])
    assert len(found) == min(count, len(ends))
    least = min(
        waste((*some, int(ends[-1])), ends, held)
        for some in combinations([int(end) for end in ends[:-1]], len(found) - 1)
    )
    assert waste(tuple(found), ends, held) == pytest.approx(least)


def test_what_is_forgotten_has_no_bucket() -> None:
    mass = np.zeros(BINS.count)
    mass[10], mass[20] = 5.0, FORGOTTEN / 2
    assert best_sizes(BINS.edges, mass, 8) == [int(BINS.edges[11])]


def test_before_enough_is_known_all_go_to_the_pool() -> None:
    buckets = AdaptiveBuckets(BINS)
    placed = [buckets.place(forecast_of(100)) for _ in range(COLD + 1)]
    assert all(each.size == 0 for each in placed[:COLD])
    assert placed[COLD].size >= placed[COLD].asked > 100


def test_sizes_follow_what_is_asked_for() -> None:
    buckets = AdaptiveBuckets(BINS, count=3)
    for _ in range(10 * RENEW):
        for median in (50, 150, 400):
            buckets.place(forecast_of(median))
    assert len(buckets.sizes) == 3
    for median in (50, 150, 400):
        placed = buckets.place(forecast_of(median))
        assert placed.asked <= placed.size < 1.25 * placed.asked
    assert buckets.place(forecast_of(1500)).size == 0  # longer than anything so far
    for _ in range(130 * RENEW):
        buckets.place(forecast_of(1500))
    assert buckets.sizes == [buckets.place(forecast_of(1500)).size]


def test_the_uncertain_go_to_the_pool() -> None:
    wide, narrow = forecast_of(100, 0.8), forecast_of(100)
    plain, careful = AdaptiveBuckets(BINS), AdaptiveBuckets(BINS, least_fill=0.5)
    for buckets in (plain, careful):
        for _ in range(2 * COLD):
            buckets.place(wide)
            buckets.place(narrow)
    assert plain.place(wide).size > 0
    assert careful.place(wide).size == 0
    assert careful.place(narrow).size > 0


@given(st.integers(1, 2048), st.sampled_from([20.0, 300.0]), st.sampled_from([0.1, 0.7]))
def test_expected_use_is_a_sum_over_lengths(size: int, median: float, spread: float) -> None:
    forecast = forecast_of(median, spread)
    expected = sum(BINS.at(forecast.curve, length) for length in range(size))
    found = AdaptiveBuckets(BINS).expected_use(forecast.curve, size)
    assert found == pytest.approx(expected, abs=0.51)  # half a token, by steps against lines


def test_control_one_bucket_wastes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def reserved() -> int:
        buckets = AdaptiveBuckets(BINS)
        return sum(
            buckets.place(forecast_of(median)).size for _ in range(4 * COLD) for median in (50, 400)
        )

    several = reserved()
    monkeypatch.setattr(
        module, "best_sizes", lambda edges, asked, count: best_sizes(edges, asked, 1)
    )
    assert reserved() > 1.3 * several


@pytest.mark.parametrize("arguments", [(0, 0.9, 0.0), (8, 1.0, 0.0), (8, 0.9, 1.0)])
def test_values_that_mean_nothing_are_refused(arguments: tuple[int, float, float]) -> None:
    with pytest.raises(ValueError):
        AdaptiveBuckets(BINS, *arguments)
