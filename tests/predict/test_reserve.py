"""What running requests will need, against sums over single requests."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from avmp_vllm.predict import reserve as module
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.forecaster import Forecast, LengthForecaster
from avmp_vllm.predict.reserve import RunningSet, pages_ahead

LONGEST, PAGE = 2048, 16
BINS = LengthBins(LONGEST, 4)


def forecast_of(median: float, spread: float) -> Forecast:
    """A log-logistic forecast: its survival is a formula."""
    with np.errstate(divide="ignore"):
        curve = 1 / (1 + (BINS.edges / median) ** (1 / spread))
    curve[-1] = 0.0
    return Forecast.of(BINS, Known(1), curve)


FORECASTS = [forecast_of(median, spread) for median in (20, 200, 900) for spread in (0.2, 0.6)]


class Request:
    """A running request, as the model of one number at a time has it."""

    def __init__(self, forecast: Forecast, prompt: int, generated: int, shared: int) -> None:
        self.forecast = forecast
        self.prompt = prompt
        self.generated = generated
        self.shared = shared
        self.coming = 0


def need(request: Request, ahead: int, state: float) -> float:
    tokens = request.prompt + request.generated
    return math.ceil(tokens / PAGE) + ahead // PAGE + state - request.shared


def naive(requests: list[Request], state: float, risk: float, window: int) -> tuple[int, float]:
    """The reserve, and pages held."""
    if not requests:
        return 0, 0.0
    held = missing = 0.0
    for request in requests:
        tokens = request.prompt + request.generated
        held += math.ceil((tokens - request.coming) / PAGE) + state
        missing += math.ceil(tokens / PAGE) - math.ceil((tokens - request.coming) / PAGE)
    now = sum(need(request, 0, state) for request in requests)
    most = 0.0
    for pages in pages_ahead(PAGE, window):
        ahead = pages * PAGE
        mean = variance = everybody = 0.0
        for request in requests:
            alive = request.forecast.survival(ahead, request.generated)
            wanted = need(request, ahead, state)
            mean += alive * wanted
            variance += alive * (1 - alive) * wanted**2
            everybody += wanted
        wanted = min(mean + risk * math.sqrt(variance), everybody)
        most = max(most, wanted - now + missing)
    return max(math.ceil(most - 1e-9), 0), held


@given(st.sampled_from([1, 16, 32]), st.integers(0, 5000))
def test_horizons_reach_the_window(page: int, window: int) -> None:
    found = pages_ahead(page, window)
    assert found[0] == 0
    assert found == sorted(set(found))
    assert found[-1] * page >= window > (found[-1] - 1) * page
    assert all(later <= max(1.6 * sooner, sooner + 1) for sooner, later in pairwise(found))


class Running(RuleBasedStateMachine):
    """Requests come, grow and go; slots are reused; both models say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.window = 3.5, 1024
        self.real = RunningSet(BINS, PAGE, self.state, self.window)
        self.naive: dict[int, Request] = {}
        self.names = 0

    @rule(
        forecast=st.sampled_from(FORECASTS),
        prompt=st.integers(1, 500),
        generated=st.integers(0, 2100),
        shared=st.integers(0, 3),
        computed=st.none() | st.integers(0, 600),
    )
    def add(
        self, forecast: Forecast, prompt: int, generated: int, shared: int, computed: int | None
    ) -> None:
        request = Request(forecast, prompt, generated, shared)
        if computed is not None:
            request.coming = max(prompt + generated - computed, 0)
        self.real.add(self.names, forecast, prompt, generated, computed, shared)
        self.naive[self.names] = request
        self.names += 1

    @precondition(lambda self: self.naive)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.naive)))
        self.real.remove(name)
        del self.naive[name]

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), tokens=st.integers(0, 700))
    def compute(self, data: st.DataObject, tokens: int) -> None:
        name = data.draw(st.sampled_from(list(self.naive)))
        request = self.naive[name]
        self.real.computed(name, tokens)
        request.coming = max(request.prompt + request.generated - tokens, 0)

    @rule(tokens=st.integers(1, 40))
    def advance(self, tokens: int) -> None:
        self.real.advance(tokens=tokens)
        for request in self.naive.values():
            request.generated += tokens

    @precondition(lambda self: self.naive)
    @rule(data=st.data(), tokens=st.integers(1, 700))
    def generate(self, data: st.DataObject, tokens: int) -> None:
        names = data.draw(st.lists(st.sampled_from(list(self.naive)), min_size=1, unique=True))
        self.real.advance(names)
        for name in names:
            self.naive[name].generated += 1
        self.naive[names[0]].generated += tokens
        self.real.generated(names[0], self.naive[names[0]].generated)

    @invariant()
    def both_reckon_the_same(self) -> None:
        requests = list(self.naive.values())
        assert len(self.real) == len(requests)
        for risk in (0.0, 1.25, 2.0):
            expected, held = naive(requests, self.state, risk, self.window)
            assert self.real.reserve(risk) == expected
            assert self.real.held() == pytest.approx(held)


TestRunning = Running.TestCase
TestRunning.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def test_control_the_comparison_sees_a_missing_square(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [Request(FORECASTS[3], 100, 10, 0) for _ in range(4)]
    real = RunningSet(BINS, PAGE, 3.5, 1024)
    for name, request in enumerate(requests):
        real.add(name, request.forecast, request.prompt, request.generated)
    expected, _ = naive(requests, 3.5, 1.25, 1024)
    assert real.reserve(1.25) == expected
    monkeypatch.setattr(module.np, "sqrt", lambda values: values)
    assert real.reserve(1.25) != expected


def test_no_horizon_between_those_looked_at_needs_much_more() -> None:
    """Steps are coarse: over all whole pages the need is at most a twentieth larger."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        requests = [
            Request(FORECASTS[rng.integers(len(FORECASTS))], 300, int(rng.integers(0, 500)), 0)
            for _ in range(20)
        ]
        running = RunningSet(BINS, PAGE, 2.0, 1024)
        for name, each in enumerate(requests):
            running.add(name, each.forecast, each.prompt, each.generated)
        now = sum(need(each, 0, 2.0) for each in requests)
        most = 0.0
        for ahead in range(0, 1025, PAGE):
            alive = [each.forecast.survival(ahead, each.generated) for each in requests]
            wanted = [need(each, ahead, 2.0) for each in requests]
            mean = sum(p * n for p, n in zip(alive, wanted, strict=True))
            spread = sum(p * (1 - p) * n * n for p, n in zip(alive, wanted, strict=True))
            most = max(most, min(mean + 1.25 * math.sqrt(spread), sum(wanted)) - now)
        assert most * 0.95 - 1 <= running.reserve(1.25) <= math.ceil(most)


def test_certain_answers_need_what_they_say() -> None:
    """All answers have 60 tokens: at 10 generated each grows by another 50, and no further."""
    bins = LengthBins(LONGEST, 32)  # every length up to 64 is a bin
    sure = Forecast.of(bins, Known(1), np.where(bins.edges < 60, 1.0, 0.0))
    running = RunningSet(bins, PAGE, 0.0, 1024)
    for name in range(10):
        running.add(name, sure, 30, 10)
    # 40 tokens fill three pages. They live for 16, 32 and 48 more, and not for 64.
    assert running.reserve(0.0) == running.reserve(5.0) == 30


def test_few_requests_of_large_states_keep_no_more_than_they_can_take() -> None:
    """Who ends is uncertain by more bytes than those that run can grow by."""
    running = RunningSet(BINS, PAGE, 500.0, 64)
    for name in range(4):
        running.add(name, FORECASTS[3], 30, 10)
    assert running.reserve(0.0) == 0
    assert running.reserve(1.25) == running.reserve(100.0) == 4 * 64 // PAGE


def test_more_risk_or_more_requests_keep_more() -> None:
    forecaster = LengthForecaster(LONGEST)
    for length in [10, 300, 900] * 30:
        forecaster.finish(forecaster.arrive(50), length)
    running = RunningSet(forecaster.bins, PAGE, 4.0)
    last = 0
    for name in range(60):
        running.add(name, forecaster.arrive(50), 50)
        found = [running.reserve(risk) for risk in (0.0, 1.0, 2.0)]
        assert found == sorted(found)
        assert found[1] >= last - 1
        last = found[1]
    assert last > 0


def test_names_and_sizes_are_checked() -> None:
    running = RunningSet(BINS, PAGE, 1.0)
    running.add("a", FORECASTS[0], 10)
    assert "a" in running
    assert "b" not in running
    with pytest.raises(ValueError, match="runs already"):
        running.add("a", FORECASTS[0], 10)
    with pytest.raises(KeyError):
        running.remove("b")
    for arguments in ((0, 1.0, 1), (16, -1.0, 1), (16, 1.0, -1)):
        with pytest.raises(ValueError):
            RunningSet(BINS, *arguments)
