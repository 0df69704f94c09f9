"""Hazards of reuse and the index that follows from them, against a search over all moments to stop.

Controls break what a test is about and expect it to fail.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.core import hazards as by_age
from avmp_vllm.core import recent, reuse
from avmp_vllm.core.hazards import BINS, EDGES, ReuseCounts, bin_of
from avmp_vllm.core.reuse import HALF_LIFE, Class, ReuseRates

#: Requests that a bin is wide, by hand: the last one is as wide as it is old.
WIDTHS = [end - begin for begin, end in zip(EDGES, (*EDGES[1:], 2 * EDGES[-1]), strict=True)]

HAZARDS = st.lists(
    st.one_of(
        st.floats(1e-8, 10.0),
        st.integers(-80, 20).map(lambda tenths: 10.0 ** (tenths / 10)),
        st.sampled_from([1e-8, 1e-3, 1e-3, 0.1, 1.0, 100.0]),
    ),
    min_size=BINS,
    max_size=BINS,
)
CLASSES = [
    Class((origin, superseded), (turns, hits))
    for origin in ("tail", "junction")
    for superseded in (False, True)
    for turns in (0, 1)
    for hits in (0, 1)
]
SEEN, UNSEEN, OTHER = CLASSES[0], CLASSES[1], CLASSES[-1]


# -- bins ------------------------------------------------------------------------------------------


def test_bins_begin_at_their_edges() -> None:
    assert BINS == len(EDGES) == 44
    assert EDGES[:12] == (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
    assert list(EDGES) == sorted(set(EDGES))
    for number, edge in enumerate(EDGES):
        assert bin_of(edge) == number
        assert bin_of(edge + WIDTHS[number] - 1) == number
        if number:
            assert bin_of(edge - 1) == number - 1


@given(st.integers(0, 10**12))
def test_no_age_is_out_of_range(age: int) -> None:
    number = bin_of(age)
    assert 0 <= number < BINS
    assert EDGES[number] <= age
    assert number == BINS - 1 or age < EDGES[number + 1]


# -- the index -------------------------------------------------------------------------------------


def best_ratio(hazards: list[float], start: int) -> float:
    """Try every bin at whose end a state could be given up; the best reuses by waiting."""
    best, reuses, waiting, there = 0.0, 0.0, 0.0, 1.0
    for hazard, width in list(zip(hazards, WIDTHS, strict=True))[start:]:
        used = -math.expm1(-hazard * width)
        reuses += there * used
        waiting += there * used / hazard
        there *= math.exp(-hazard * width)
        best = max(best, reuses / waiting)
    return best


@settings(max_examples=300, deadline=None, derandomize=True)
@given(HAZARDS)
def test_the_index_is_the_best_of_all_moments_to_stop(hazards: list[float]) -> None:
    indices = by_age.gittins_indices(hazards)
    assert indices == pytest.approx([best_ratio(hazards, start) for start in range(BINS)], rel=1e-6)
    assert all(a >= b * (1 - 1e-6) for a, b in zip(indices, hazards, strict=True))
    assert max(indices) <= max(hazards) * (1 + 1e-6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(HAZARDS)
def test_the_chance_not_to_be_used_falls(hazards: list[float]) -> None:
    unused = by_age.unused_chances(hazards)
    assert len(unused) == BINS
    assert all(0.0 <= chance <= 1.0 for chance in unused)
    assert unused == sorted(unused, reverse=True)
    exponents = [h * w for h, w in zip(hazards, WIDTHS, strict=True)]
    assert unused[7] == pytest.approx(math.exp(-sum(exponents[:8])), rel=1e-9)


def test_idle_states_that_tend_to_come_back_are_worth_more_than_new_ones() -> None:
    """A daily prompt: the index rises towards the age at which it comes, and falls behind it."""
    comes = bin_of(1_000)
    hazards = [1e-6] * BINS
    hazards[comes] = 0.1
    indices = by_age.gittins_indices(hazards)
    assert indices[: comes + 1] == sorted(indices[: comes + 1])
    assert indices[comes] == pytest.approx(0.1, rel=1e-3)
    assert indices[comes + 1] == pytest.approx(1e-6, rel=1e-3)
    # A new one waits until then, and some requests more.
    assert indices[0] == pytest.approx(1 / (EDGES[comes] + 10), rel=1e-2)


# -- what is learned -------------------------------------------------------------------------------


def live(rates: ReuseRates, cls: Class, lives: int, age: int, used: bool) -> None:
    """So many states of a class get to an age, a request each, and are used then or not."""
    last = bin_of(age)
    for _ in range(lives):
        rates.tick()
        for number in range(last):
            rates.waited(cls, number, WIDTHS[number])
        rates.waited(cls, last, age - EDGES[last])
        if used:
            rates.reused(cls, last)


def current(rates: ReuseRates, cls: Class, age_bin: int) -> float:
    """The index as of now, whatever it was when the epoch began."""
    return by_age.gittins_indices(list(rates._hazards(cls)))[age_bin]


def test_what_is_used_is_worth_more() -> None:
    rates = ReuseRates()
    start = rates.index(OTHER, 0)
    live(rates, SEEN, 300, age=20, used=True)
    live(rates, OTHER, 300, age=20, used=False)
    assert rates.index(SEEN, 0) > 10 * rates.index(OTHER, 0)
    assert rates.index(OTHER, 0) < start < rates.index(SEEN, 0)
    assert rates.chance(SEEN, 24) > 0.8
    assert rates.chance(OTHER, 24) < 0.1


def test_the_index_is_the_rate_that_was_seen() -> None:
    """Half of the states are used at an age of 20, the others seen to wait until 24."""
    rates = ReuseRates()
    for _ in range(3_000):
        live(rates, SEEN, 1, age=20, used=True)
        live(rates, SEEN, 1, age=24, used=False)
    # Reuses by waiting, both in that bin alone: one in (20 - 16) + (24 - 16) requests.
    assert current(rates, SEEN, bin_of(20)) == pytest.approx(1 / 12, rel=0.01)
    assert rates.index(SEEN, bin_of(20)) == pytest.approx(1 / 12, rel=0.01)


def test_a_class_borrows_from_its_family() -> None:
    rates = ReuseRates()
    live(rates, SEEN, 300, age=20, used=True)
    live(rates, OTHER, 300, age=20, used=False)
    assert UNSEEN.family == SEEN.family != OTHER.family
    kin = Class(OTHER.family, (3, 2))
    assert rates.index(UNSEEN, 0) > 5 * rates.index(kin, 0)
    # What it has seen itself counts for more.
    live(rates, UNSEEN, 100, age=20, used=False)
    assert rates.index(UNSEEN, 0) < 0.5 * rates.index(SEEN, 0)


def test_indices_are_computed_again_after_an_eighth_of_the_requests() -> None:
    rates = ReuseRates()
    began, epoch, lengths = 0, 0, []
    found = rates.index(SEEN, 0)
    for _ in range(6_000):
        live(rates, SEEN, 1, age=5, used=rates.now % 7 < 4)
        if rates.epoch == epoch:
            assert rates.index(SEEN, 0) == found
            continue
        assert rates.epoch == epoch + 1
        lengths.append((began, rates.now - began))
        began, epoch = rates.now, rates.epoch
        found = rates.index(SEEN, 0)
        assert found == current(rates, SEEN, 0)
    # The first epoch ends with the first request.
    assert lengths[0] == (0, 1)
    assert all(length == min(max(now // 8, 16), 256) for now, length in lengths[1:])
    assert {16, 256} < {length for _, length in lengths}


def test_indices_follow_what_is_learned() -> None:
    rates = ReuseRates()
    before = rates.index(SEEN, 0)
    live(rates, SEEN, 1, age=5, used=True)
    live(rates, SEEN, reuse._SOONEST, age=5, used=True)
    assert rates.index(SEEN, 0) > 2 * before


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.lists(st.integers(-5, 2 * EDGES[-1]), min_size=2, max_size=20))
def test_chances_are_chances_and_grow_with_the_horizon(seed: int, horizons: list[int]) -> None:
    rates = ReuseRates()
    for _ in calls(rates, random.Random(seed), 100):
        pass
    for cls in CLASSES:
        chances = [rates.chance(cls, horizon) for horizon in sorted(horizons)]
        assert all(0.0 <= chance <= 1.0 for chance in chances)
        assert chances == sorted(chances)
        assert all(math.isfinite(rates.index(cls, b)) for b in range(BINS))


# -- forgetting ------------------------------------------------------------------------------------


@pytest.fixture
def never_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is forgotten at once."""
    monkeypatch.setattr(reuse, "CHANGED", math.inf)


def share_left(rates: ReuseRates, before: bool) -> float:
    """Half a life of one behaviour, half a life of the other: what is left of the first index."""
    live(rates, SEEN, HALF_LIFE, age=20, used=before)
    first = current(rates, SEEN, bin_of(20))
    live(rates, SEEN, HALF_LIFE, age=20, used=not before)
    return current(rates, SEEN, bin_of(20)) / first


@pytest.mark.usefixtures("never_anew")
def test_what_was_learned_counts_half_after_half_a_life() -> None:
    # Two parts of the new to one of the old.
    assert share_left(ReuseRates(), before=True) == pytest.approx(1 / 3, rel=0.02)
    assert share_left(ReuseRates(), before=False) > 100


@pytest.mark.usefixtures("never_anew")
def test_control_without_forgetting_the_old_counts_as_much_as_the_new() -> None:
    rates = ReuseRates()
    rates._growth = 1.0
    assert share_left(rates, before=True) == pytest.approx(1 / 2, rel=0.02)


def settled(rates: ReuseRates, chances: dict[Class, float], requests: int, seed: int) -> None:
    """States of some classes, each with its chance to be used; they end at ages up to 100."""
    rng = random.Random(seed)
    for _ in range(requests):
        rates.tick()
        for cls, chance in chances.items():
            age = rng.randint(1, 100)
            last = bin_of(age)
            for number in range(last):
                rates.waited(cls, number, WIDTHS[number])
            rates.waited(cls, last, age - EDGES[last])
            if rng.random() < chance:
                rates.reused(cls, last)


BEFORE, AFTER = {SEEN: 0.6, OTHER: 0.02}, {SEEN: 0.02, OTHER: 0.6}


def error_after_a_change() -> tuple[int, float]:
    """Times that it was noticed, and how far off an index is from one that knew no other time."""
    rates, fresh = ReuseRates(), ReuseRates()
    settled(rates, BEFORE, 3_000, seed=1)
    assert rates.changes == 0
    settled(rates, AFTER, 300, seed=2)
    settled(fresh, AFTER, 300, seed=2)
    now = current(rates, OTHER, 0)
    return rates.changes, abs(now / current(fresh, OTHER, 0) - 1)


def test_what_no_longer_holds_is_forgotten_at_once() -> None:
    changes, error = error_after_a_change()
    assert changes >= 1
    assert error < 0.2


@pytest.mark.usefixtures("never_anew")
def test_control_a_long_memory_alone_is_wrong_for_long() -> None:
    assert error_after_a_change()[1] > 0.3


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_forgotten_while_nothing_changes(seed: int) -> None:
    rates = ReuseRates()
    settled(rates, BEFORE, 4_000, seed)
    assert rates.changes == 0


def test_the_short_memory_stays_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brought back again and again, with half a life of five requests: evidence stays the same."""
    found = []
    for most in (1e12, 1e300):
        monkeypatch.setattr(recent, "MOST_WEIGHT", most)
        rates = ReuseRates()
        rates._recent._growth = 2.0**0.2
        settled(rates, BEFORE, 600, seed=3)
        found.append(rates._recent.evidence)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def calls(rates: ReuseRates, rng: random.Random, count: int) -> Iterator[list[float]]:
    """Random calls; after every few of them, all indices."""
    for number in range(count):
        rates.tick()
        for _ in range(rng.randint(0, 3)):
            cls = rng.choice(CLASSES)
            age = int(2 ** rng.uniform(0, 20))
            live_bin = bin_of(age)
            rates.waited(cls, live_bin, age - EDGES[live_bin])
            if rng.random() < 0.3:
                rates.reused(cls, live_bin)
        if number % 20 == 0:
            yield [rates.index(cls, age_bin) for cls in CLASSES for age_bin in range(BINS)]


def test_equal_calls_give_equal_indices() -> None:
    one, other = (list(calls(ReuseRates(), random.Random(7), 400)) for _ in range(2))
    assert one == other


def rescaled(weight: float) -> tuple[ReuseRates, list[list[float]]]:
    """The indices of calls that begin with a weight."""
    rates = ReuseRates()
    rates._weight = weight
    return rates, list(calls(rates, random.Random(8), 400))


def test_scaling_down_changes_no_index() -> None:
    """One of two begins where all counts are scaled down some requests later."""
    steady, expected = rescaled(1.0)
    scaled, found = rescaled(0.98e12)
    assert steady._weight > 1.0
    assert scaled._weight < 2.0, "nothing was scaled"
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.usefixtures("never_anew")
def test_the_weight_stays_finite() -> None:
    """Scaled down again and again, with half a life of ten requests."""
    rates = ReuseRates()
    rates._growth = 2.0**0.1
    indices = []
    for number in range(3_000):
        live(rates, SEEN, 1, age=20, used=True)
        if number % 100 == 99:
            indices.append(rates.index(SEEN, 0))
    assert 1.0 <= rates._weight <= 1e12
    assert indices[5:] == pytest.approx([indices[-1]] * len(indices[5:]), rel=1e-6)


# -- controls --------------------------------------------------------------------------------------


def test_control_scaling_some_of_the_counts_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = ReuseCounts.scale

    def some(self: ReuseCounts, factor: float) -> None:
        waited = self.waited
        scale(self, factor)
        self.waited = waited

    monkeypatch.setattr(ReuseCounts, "scale", some)
    with pytest.raises(AssertionError):
        test_scaling_down_changes_no_index()


def test_control_an_index_that_looks_no_further_than_its_bin_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(by_age, "gittins_indices", list)
    with pytest.raises(AssertionError):
        test_idle_states_that_tend_to_come_back_are_worth_more_than_new_ones()


def test_control_indices_that_are_never_computed_again_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reuse, "_SOONEST", 10_000)
    monkeypatch.setattr(reuse, "_LATEST", 10_000)
    with pytest.raises(AssertionError):
        test_indices_are_computed_again_after_an_eighth_of_the_requests()
