"""Bins of lengths, and curves over them, against sums over single lengths."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmp_vllm.predict.bins import LengthBins

BINS = LengthBins(1000, 4)


def curve_of(masses: list[float], bins: LengthBins = BINS) -> np.ndarray:
    """A curve that falls by the given shares, the rest in the last bin."""
    falls = np.zeros(bins.count)
    falls[: len(masses)] = masses[: bins.count]
    falls[-1] += max(1.0 - falls.sum(), 0.0)
    falls /= falls.sum()
    curve = np.concatenate([[1.0], 1.0 - np.cumsum(falls)])
    curve[-1] = 0.0
    return curve


def by_length(curve: np.ndarray, bins: LengthBins = BINS) -> np.ndarray:
    """P(length = n) for n = 0 .. longest: a bin's mass in equal parts."""
    found = np.zeros(bins.longest + 1)
    for low, high, above, below in zip(
        bins.edges[:-1].astype(int),
        bins.edges[1:].astype(int),
        curve[:-1],
        curve[1:],
        strict=True,
    ):
        found[low + 1 : high + 1] = (above - below) / (high - low)
    return found


CURVES = st.lists(st.floats(0, 1), min_size=1, max_size=BINS.count).map(curve_of)


@given(st.integers(1, 5000), st.sampled_from([1, 2, 4, 8]))
def test_edges_ascend_from_nothing_to_the_longest(longest: int, per_octave: int) -> None:
    bins = LengthBins(longest, per_octave)
    edges = bins.edges.tolist()
    assert edges[0] == 0
    assert edges[-1] == longest
    assert edges == sorted(set(edges))
    assert bins.count == len(edges) - 1
    for low, high in pairwise(edges[1:]):
        assert high - low == 1 or high / low <= 2 ** (1 / per_octave) + 1 / low
    for octave in (2**power for power in range(13) if 2**power <= longest):
        assert octave in edges


@given(st.integers(1, 2000))
def test_a_length_lies_in_its_bin(length: int) -> None:
    number = BINS.bin(length)
    assert BINS.edges[number] < min(length, 1000) <= BINS.edges[number + 1]


@given(st.integers(0, 999))
def test_what_an_answer_is_through(length: int) -> None:
    number, part = BINS.passed(length)
    assert 0 <= part < 1
    low, high = BINS.edges[number], BINS.edges[number + 1]
    assert low + part * (high - low) == pytest.approx(length)
    assert BINS.below(np.array([length])).tolist() == [number]


@given(CURVES, st.integers(0, 1200))
def test_survival_is_what_is_left(curve: np.ndarray, length: int) -> None:
    expected = by_length(curve)[length + 1 :].sum() if length < 1000 else 0.0
    assert BINS.at(curve, length) == pytest.approx(expected, abs=1e-9)


@given(CURVES, st.floats(0.05, 0.95), st.integers(0, 900))
def test_a_quantile_is_the_least_length_that_holds_enough(
    curve: np.ndarray, share: float, generated: int
) -> None:
    masses = by_length(curve)
    left = masses[generated + 1 :].sum()
    found = BINS.quantile(curve, share, generated)
    assert generated < found <= 1000
    if left < 1e-6:
        return
    within = masses[generated + 1 : found + 1].sum() / left
    less = masses[generated + 1 : found].sum() / left
    assert within >= share - 1e-6
    assert less < share + 1e-6 or found == generated + 1


@given(CURVES)
def test_the_mean_is_the_mean(curve: np.ndarray) -> None:
    masses = by_length(curve)
    assert BINS.mean(curve) == pytest.approx((np.arange(1001) * masses).sum(), rel=1e-6)


@pytest.mark.parametrize(("longest", "per_octave"), [(0, 4), (10, 0), (10, 3)])
def test_bins_of_nothing_are_refused(longest: int, per_octave: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        LengthBins(longest, per_octave)
