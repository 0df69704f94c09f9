"""Admission: the reserve, and refusals that stand for a while."""

from __future__ import annotations

import numpy as np
import pytest

from avmp_vllm.predict.admission import REFUSAL_STEPS, Admission
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.forecaster import Forecast
from avmp_vllm.predict.reserve import RunningSet

BINS = LengthBins(2048, 4)
PAGE = 16
LONG = Forecast.of(BINS, Known(1), 1 / (1 + (BINS.edges / 600) ** 3))


def made(running: int, risk: float = 0.0) -> Admission:
    requests = RunningSet(BINS, PAGE, 2.0)
    for name in range(running):
        requests.add(name, LONG, 160)
    return Admission(requests, risk)


def admits(admission: Admission, name: str, pages: int, available: int) -> bool:
    """What a scheduler makes of it."""
    if admission.stands(name):
        return False
    if pages + admission.reserve() > available:
        admission.refused(name)
        return False
    return True


def test_a_request_alone_may_have_everything() -> None:
    admission = made(0)
    assert admits(admission, "a", 50, 50)
    assert not admits(admission, "a", 51, 50)


def test_it_admits_what_leaves_the_reserve() -> None:
    admission = made(10)
    reserve = admission.reserve()
    assert admits(admission, "a", 7, 7 + reserve)
    assert not admits(admission, "a", 7, 6 + reserve)
    assert admission.refusals == 1


def test_a_refusal_stands_until_something_comes_free() -> None:
    admission = made(10)
    assert not admits(admission, "a", 7, 8)
    reckoned = admission.reckoned
    for _ in range(REFUSAL_STEPS - 1):
        admission.step()
        assert not admits(admission, "a", 7, 10**6)  # nothing ended, so this cannot be
    assert admission.reckoned == reckoned
    admission.freed()
    assert admits(admission, "a", 7, 10**6)
    assert admission.reckoned == reckoned + 1


def test_a_refusal_does_not_stand_for_ever_nor_for_others() -> None:
    admission = made(10)
    assert not admits(admission, "a", 7, 8)
    assert admits(admission, "b", 7, 10**6)
    assert not admits(admission, "a", 7, 8)
    for _ in range(REFUSAL_STEPS):
        admission.step()
    assert admits(admission, "a", 7, 10**6)


@pytest.mark.parametrize("load", range(4))
def test_standing_refusals_decide_the_same_for_less(load: int) -> None:
    """A queue over a small memory, with refusals that stand and without."""

    def run(standing: bool) -> tuple[list[tuple[int, str]], int]:
        rng = np.random.default_rng(load)
        requests = RunningSet(BINS, PAGE, 2.0)
        admission = Admission(requests, 1.0)
        memory, started, waiting = 400.0, [], 0
        left: dict[str, int] = {}
        lengths = rng.integers(5, 400, 200)
        for step in range(6000):
            if not standing:
                admission.freed()
            while waiting < len(lengths) and admits(
                admission, f"{waiting}", 12, int(memory - requests.held())
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


def test_a_risk_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        Admission(RunningSet(BINS, PAGE, 1.0), -1.0)
