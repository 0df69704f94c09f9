"""Admission: the break-even horizon, the reserve, and refusals that stand for a while."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avmp_vllm.predict.admission import REFUSAL_STEPS, Admission, break_even
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.forecaster import Forecast
from avmp_vllm.predict.reserve import RunningSet

BINS = LengthBins(2048, 4)
PAGE = 16
LONG = Forecast.of(BINS, Known(1), 1 / (1 + (BINS.edges / 600) ** 3))


def made(running: int, risk: float = 0.0, ratio: float = 400.0) -> Admission:
    requests = RunningSet(BINS, PAGE, 2.0)
    for name in range(running):
        requests.add(name, LONG, 160)
    return Admission(requests, risk, ratio)


def admits(admission: Admission, name: str, tokens: int, pages: int, available: int) -> bool:
    """What a scheduler makes of it."""
    if admission.stands(name):
        return False
    if pages + admission.reserve(tokens) > available:
        admission.refused(name)
        return False
    return True


@given(st.integers(1, 10**5), st.integers(1, 300), st.floats(1, 10**4))
def test_break_even_is_where_both_sides_cost_the_same(
    tokens: int, running: int, ratio: float
) -> None:
    steps = break_even(tokens, running, ratio)
    if ratio <= running:
        assert steps == math.inf
        # Each token that it gets saves less than computing that token again costs.
        assert 1e6 * ratio / running <= 1e6 + tokens
    else:
        assert steps * ratio / running == pytest.approx(tokens + steps, rel=1e-6)


def test_longer_prompts_look_further_ahead() -> None:
    admission = made(40)
    found = [admission.reserve(tokens) for tokens in (10, 500, 2000, 20000)]
    assert found == sorted(found)
    assert found[0] < found[-1]


def test_where_a_step_costs_little_the_horizon_has_no_end() -> None:
    assert made(40, ratio=40.0).reserve(10) == made(40, ratio=10.0).reserve(10)
    assert made(40, ratio=40.0).reserve(10) > made(40, ratio=400.0).reserve(10)


def test_the_window_ends_the_horizon() -> None:
    near, far = (Admission(RunningSet(BINS, PAGE, 2.0, window), 0.0, 400) for window in (16, 1024))
    for name in range(40):
        near._running.add(name, LONG, 160)
        far._running.add(name, LONG, 160)
    assert near.reserve(10**5) == 40  # the next page of each
    assert far.reserve(10**5) > 40


def test_a_request_alone_may_have_everything() -> None:
    admission = made(0)
    assert admits(admission, "a", 100, 50, 50)
    assert not admits(admission, "a", 100, 51, 50)


def test_it_admits_what_leaves_the_reserve() -> None:
    admission = made(10)
    reserve = admission.reserve(100)
    assert admits(admission, "a", 100, 7, 7 + reserve)
    assert not admits(admission, "a", 100, 7, 6 + reserve)
    assert admission.refusals == 1


def test_a_refusal_stands_until_something_comes_free() -> None:
    admission = made(10)
    assert not admits(admission, "a", 100, 7, 8)
    reckoned = admission.reckoned
    for _ in range(REFUSAL_STEPS - 1):
        admission.step()
        assert not admits(admission, "a", 100, 7, 10**6)  # nothing ended, so this cannot be
    assert admission.reckoned == reckoned
    admission.freed()
    assert admits(admission, "a", 100, 7, 10**6)
    assert admission.reckoned == reckoned + 1


def test_a_refusal_does_not_stand_for_ever_nor_for_others() -> None:
    admission = made(10)
    assert not admits(admission, "a", 100, 7, 8)
    assert admits(admission, "b", 100, 7, 10**6)
    assert not admits(admission, "a", 100, 7, 8)
    for _ in range(REFUSAL_STEPS):
        admission.step()
    assert admits(admission, "a", 100, 7, 10**6)


@pytest.mark.parametrize("load", range(4))
def test_standing_refusals_decide_the_same_for_less(load: int) -> None:
    """A queue over a small memory, with refusals that stand and without."""

    def run(standing: bool) -> tuple[list[tuple[int, str]], int]:
        rng = np.random.default_rng(load)
        requests = RunningSet(BINS, PAGE, 2.0)
        admission = Admission(requests, 1.0, 400)
        memory, started, waiting = 400.0, [], 0
        left: dict[str, int] = {}
        lengths = rng.integers(5, 400, 200)
        for step in range(3000):
            if not standing:
                admission.freed()
            while waiting < len(lengths) and admits(
                admission, f"{waiting}", 160, 12, int(memory - requests.held())
            ):
                requests.add(f"{waiting}", LONG, 160)
                left[f"{waiting}"] = int(lengths[waiting])
                started.append((step, f"{waiting}"))
                waiting += 1
            admission.step()
            requests.advance()
            for name in [name for name, tokens in left.items() if tokens == 1]:
                requests.remove(name)
                del left[name]
                admission.freed()
            left = {name: tokens - 1 for name, tokens in left.items()}
        return started, admission.reckoned

    with_standing, few = run(True)
    without, many = run(False)
    # Answers that get longer are likelier to end soon, so need may fall a little by itself.
    late = [one[0] - other[0] for one, other in zip(with_standing, without, strict=True)]
    assert len(with_standing) == 200
    assert max(late) <= 2 * REFUSAL_STEPS
    assert few < many / 3


@pytest.mark.parametrize("arguments", [(-1.0, 1), (0.0, 0)])
def test_values_that_mean_nothing_are_refused(arguments: tuple[float, float]) -> None:
    with pytest.raises(ValueError):
        Admission(RunningSet(BINS, PAGE, 1.0), *arguments)
