"""The survival model against one written in loops, and what it learns of drawn answers.

Controls break the rule that a test is about and expect it to fail.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avmp_vllm.predict import features, forecaster, hazards, mixture
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.features import Known, keys
from avmp_vllm.predict.forecaster import MEMORIES, ROW_MEMORY, Forecast, LengthForecaster

LONGEST = 4096


class Naive:
    """The same model, one number at a time and without any caching.

    It keeps each row's events and exposure as dictionaries by bin.
    """

    def __init__(
        self,
        worth: float = hazards.PARENT_WORTH,
        keep: float = mixture.KEEP,
        least: float = mixture.LEAST,
    ) -> None:
        self.worth, self.keep, self.least = worth, keep, least
        self.bins = LengthBins(LONGEST, forecaster.PER_OCTAVE)
        self.events: dict[int, dict[int, float]] = {}
        self.exposure: dict[int, dict[int, float]] = {}
        self.loss = [0.0] * (len(MEMORIES) + 9)

    def hazards(self, known: Known) -> list[list[float]]:
        """Of each model, by bin."""
        edges = self.bins.edges

        def alive(edge: float) -> float:
            return 1 / (1 + edge / hazards.PRIOR_SCALE)

        found = []
        for row in range(len(MEMORIES)):
            worth = [hazards.PRIOR_WORTH * alive(edges[b]) for b in range(self.bins.count)]
            ended = [
                hazards.PRIOR_WORTH * (alive(edges[b]) - alive(edges[b + 1]))
                for b in range(self.bins.count)
            ]
            found.append([self.hazard(row, b, ended[b], worth[b]) for b in range(self.bins.count)])
        rows = keys(known)
        for place, row in enumerate(rows):
            above = found[len(MEMORIES) - 1] if place < 3 else found[len(MEMORIES) + place - 3]
            bins = range(self.bins.count)
            found.append([self.hazard(row, b, self.worth * above[b], self.worth) for b in bins])
        return found

    def hazard(self, row: int, b: int, events: float, exposure: float) -> float:
        events += self.events.get(row, {}).get(b, 0.0)
        return events / (exposure + self.exposure.get(row, {}).get(b, 0.0))

    def curves(self, known: Known) -> list[list[float]]:
        found = []
        for each in self.hazards(known):
            curve = [1.0]
            for hazard in each:
                curve.append(curve[-1] * (1 - hazard))
            curve[-1] = 0.0
            found.append(curve)
        return found

    def weights(self) -> list[float]:
        least = min(self.loss)
        shares = [math.exp(least - loss) for loss in self.loss]
        return [share / sum(shares) for share in shares]

    def curve(self, known: Known) -> list[float]:
        weights, curves = self.weights(), self.curves(known)
        return [
            sum(w * c[edge] for w, c in zip(weights, curves, strict=True))
            for edge in range(self.bins.count + 1)
        ]

    def rows(self, known: Known) -> list[int]:
        return [*range(len(MEMORIES)), *keys(known)]

    def expose(self, known: Known, begin: int, end: int) -> None:
        for row in self.rows(known):
            cells = self.exposure.setdefault(row, {})
            for b in range(begin, end):
                cells[b] = cells.get(b, 0.0) + 1

    def finish(self, known: Known, curves: list[list[float]], begin: int, length: int) -> None:
        end = self.bins.bin(length)
        for place, row in enumerate(self.rows(known)):
            memory = [*MEMORIES, *[ROW_MEMORY] * 9][place]
            for table in (self.events, self.exposure):
                cells = table.setdefault(row, {})
                for b in cells:
                    cells[b] *= 1 - 1 / memory
        self.expose(known, begin, end + 1)
        for row in self.rows(known):
            self.events[row][end] = self.events[row].get(end, 0.0) + 1
        low = 0 if length == 1 else 2 ** math.ceil(math.log2(length) - 1)
        high = min(2 * low or 1, LONGEST)
        places = [self.bins.edges.tolist().index(edge) for edge in (low, high)]
        for place, curve in enumerate(curves):
            fell = curve[places[0]] - curve[places[1]]
            self.loss[place] = self.keep * self.loss[place] - math.log(max(fell, self.least))

    def stop(self, known: Known, curves: list[list[float]], begin: int, length: int) -> None:
        """Cut off: it went through some bins, and outlived the octaves before the one it is in."""
        passed, _ = self.bins.passed(length)
        self.expose(known, begin, passed)
        edges = self.bins.edges.tolist()
        begun = max(e for e in (0, *(2**k for k in range(12))) if e <= edges[passed])
        for place, curve in enumerate(curves):
            outlived = max(curve[edges.index(begun)], self.least)
            self.loss[place] = self.keep * self.loss[place] - math.log(outlived)


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 3000), st.integers(0, 4), st.integers(1, 4096), st.integers(1, LONGEST)
    ),
    min_size=1,
    max_size=25,
)


def compare(
    requests: list[tuple[int, int, int, int]],
    progress: bool,
    stopped: frozenset[int] = frozenset(),
    **rule: float,
) -> None:
    """Both models on requests that run one after the other; curves must be equal."""
    real, naive = LengthForecaster(LONGEST), Naive(**rule)
    for number, (prompt, turn, previous, length) in enumerate(requests):
        known = Known(prompt, turn, previous if turn else None)
        found, curves = real.forecast(known), naive.curves(known)
        np.testing.assert_allclose(found.curve, naive.curve(known), atol=1e-9)
        begin = 0
        if progress and length > 20:
            real.progress(found, length // 2)
            begin = naive.bins.passed(length // 2)[0]
            naive.expose(known, 0, begin)
        if number in stopped:
            real.stop(found, length)
            naive.stop(known, curves, begin, length)
        else:
            real.finish(found, length)
            naive.finish(known, curves, min(begin, naive.bins.bin(length)), length)
        np.testing.assert_allclose(real.weights, naive.weights(), atol=1e-9)


@given(REQUESTS, st.booleans(), st.frozensets(st.integers(0, 24)))
@settings(max_examples=40, deadline=None)
def test_equal_to_the_model_in_loops(
    requests: list[tuple[int, int, int, int]], progress: bool, stopped: frozenset[int]
) -> None:
    """Some answers end by themselves, some are cut off."""
    compare(requests, progress, stopped)


@pytest.mark.parametrize("rule", [{"worth": 9.0}, {"keep": 0.98}, {"least": 0.2}])
def test_control_the_comparison_sees_a_changed_rule(rule: dict[str, float]) -> None:
    requests = [(100, 0, 1, 50), (100, 1, 50, 60), (3000, 2, 60, 4000), (100, 1, 60, 70)]
    compare(requests, False)
    with pytest.raises(AssertionError):
        compare(requests, False, frozenset(), **rule)


# -- what it knows ---------------------------------------------------------------------------------


def train(found: LengthForecaster, lengths: list[int], prompt: int = 100) -> None:
    for length in lengths:
        found.finish(found.arrive(prompt), length)


def drawn(seed: int, count: int, median: float = 300.0, spread: float = 0.7) -> list[int]:
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.normal(math.log(median), spread, count))
    return [min(max(1, round(length)), LONGEST) for length in lengths]


def test_before_anything_the_prior() -> None:
    """Half of all answers are longer than its scale."""
    forecast = LengthForecaster(LONGEST).arrive(100)
    assert forecast.survival(128) == pytest.approx(0.5, abs=0.02)
    assert forecast.quantile(0.5) == pytest.approx(128, rel=0.1)


def test_it_learns_a_distribution() -> None:
    found = LengthForecaster(LONGEST)
    train(found, drawn(0, 2000))
    forecast = found.arrive(100)
    lengths = np.array(drawn(1, 4000))
    for more in (50, 150, 300, 600, 1200):
        assert forecast.survival(more) == pytest.approx((lengths > more).mean(), abs=0.05)
    for share in (0.1, 0.5, 0.9):
        assert (lengths <= forecast.quantile(share)).mean() == pytest.approx(share, abs=0.05)
    assert forecast.mean() == pytest.approx(lengths.mean(), rel=0.1)


@pytest.mark.parametrize("generated", [100, 300, 700])
def test_what_has_been_generated_counts(generated: int) -> None:
    found = LengthForecaster(LONGEST)
    train(found, drawn(0, 3000))
    forecast = found.arrive(100)
    lengths = np.array(drawn(1, 20000))
    left = lengths[lengths > generated]
    for more in (50, 200):
        expected = (left > generated + more).mean()
        assert forecast.survival(more, generated) == pytest.approx(expected, abs=0.08)
    assert (left <= forecast.quantile(0.9, generated)).mean() == pytest.approx(0.9, abs=0.06)


@given(st.integers(0, LONGEST), st.integers(0, 2000), st.integers(0, 2000))
def test_survival_is_a_probability_that_falls(generated: int, more: int, further: int) -> None:
    found = LengthForecaster(LONGEST)
    train(found, [3, 500, 2000])
    forecast = found.arrive(7)
    one, other = (forecast.survival(t, generated) for t in (more, more + further))
    assert 0 <= other <= one <= 1
    if generated < LONGEST:
        assert forecast.survival(0, generated) == 1
        both = forecast.survival(more, generated) * forecast.survival(further, generated + more)
        assert both == pytest.approx(other, abs=1e-9)


def test_prompt_lengths_that_say_everything() -> None:
    """Two kinds of request with one length each; mixed up they would be a guess."""
    found = LengthForecaster(LONGEST)
    for _ in range(200):
        train(found, [30], prompt=100)
        train(found, [1000], prompt=1500)
    assert found.arrive(100).quantile(0.9) < 60
    assert found.arrive(1500).quantile(0.1) > 700
    ladder = features.LADDERS
    assert sum(found.weights[len(MEMORIES) :: ladder]) > 0.9  # prompts come first in each level


def test_a_feature_that_says_nothing_costs_nothing() -> None:
    """Random prompts: log-loss within 0.02 nats of the model without features, per octave."""
    found = LengthForecaster(LONGEST)
    rng = np.random.default_rng(3)
    mixed, general = [], []
    bins = found.bins
    for number, length in enumerate(drawn(4, 3000)):
        forecast = found.arrive(int(rng.integers(1, 3000)))
        if number >= 500:
            low, high = 2 ** math.ceil(math.log2(length) - 1), 2 ** math.ceil(math.log2(length))
            alone = found._curves(found._table.rows([0, 1, 2, *keys(forecast.known)]))[1]
            for curve, losses in ((forecast.curve, mixed), (alone, general)):
                losses.append(-math.log(bins.at(curve, low) - bins.at(curve, high)))
        found.finish(forecast, length)
    assert np.mean(mixed) < np.mean(general) + 0.02


def test_the_previous_answer_is_found_and_used() -> None:
    """Conversations whose answers are all as long as their first."""
    found = LengthForecaster(LONGEST)
    rng = np.random.default_rng(5)
    name = 0
    for _ in range(300):
        length = int(rng.choice([20, 1500]))
        hashes = [f"h{name}"]
        for turn in range(3):
            forecast = found.arrive(500, hashes if turn else ["new"])
            assert forecast.known.turn == turn
            assert forecast.known.previous == (length if turn else None)
            name += 1
            hashes = [*hashes, f"h{name}"]
            found.finish(forecast, length, hashes)
    hashes = ["a", "b"]
    found.finish(found.arrive(500), 20, hashes)
    assert found.arrive(500, [*hashes, "c"]).quantile(0.9) < 40
    found.finish(found.arrive(500), 1500, ["a", "d"])
    assert found.arrive(500, ["a", "d"]).quantile(0.1) > 1000


# -- censoring -------------------------------------------------------------------------------------


def test_running_requests_are_exposure() -> None:
    """After a start only short answers have ended; that long ones run says how few are short."""
    informed, blind = LengthForecaster(LONGEST), LengthForecaster(LONGEST)
    for found in (informed, blind):
        running = [found.arrive(100) for _ in range(100)]
        train(found, [10] * 20)
        if found is informed:
            for forecast in running:
                found.progress(forecast, 300)
    assert informed.arrive(100).survival(100) > 0.7
    assert blind.arrive(100).survival(100) < 0.4  # the control


def test_progress_counts_once() -> None:
    """However often it is told, an answer is one answer."""
    often, once = LengthForecaster(LONGEST), LengthForecaster(LONGEST)
    one, other = often.arrive(100), once.arrive(100)
    for tokens in (5, 16, 16, 40, 300, 301):
        often.progress(one, tokens)
    once.progress(other, 301)
    np.testing.assert_allclose(often._table.cells, once._table.cells)
    assert one.next_progress == other.next_progress == 512
    often.finish(one, 400)
    once.finish(other, 400)
    np.testing.assert_allclose(often._table.cells, once._table.cells)


@pytest.mark.parametrize("cap", [64, 256])
def test_capped_answers_do_not_look_short(cap: int) -> None:
    """All answers are cut off at a cap: those that were would have gone on."""
    lengths = drawn(0, 2000)
    censored, naive = LengthForecaster(LONGEST), LengthForecaster(LONGEST)
    for length in lengths:
        for found in (censored, naive):
            forecast = found.arrive(100)
            if length <= cap:
                found.finish(forecast, length)
            elif found is censored:
                found.stop(forecast, cap)
            else:
                found.finish(forecast, cap)
    expected = (np.array(lengths) > cap).mean()
    assert censored.arrive(100).survival(cap) == pytest.approx(expected, abs=0.06)
    assert naive.arrive(100).survival(cap) < 0.1  # the control
    assert censored.score.answers < naive.score.answers


def test_stopping_before_the_first_token_teaches_nothing() -> None:
    found = LengthForecaster(LONGEST)
    forecast = found.arrive(100)
    before = found.weights.copy()
    found.stop(forecast, 0, ["h"])
    assert found._table.cells.sum() == 0
    np.testing.assert_array_equal(found.weights, before)
    assert found.arrive(100, ["h"]).known.turn == 0


# -- drift, bounds, determinism --------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(50.0, 1000.0), (1000.0, 50.0)])
def test_it_follows_a_change(first: float, second: float) -> None:
    found = LengthForecaster(LONGEST)
    train(found, drawn(0, 3000, first, 0.4))
    train(found, drawn(1, 400, second, 0.4))
    lengths = np.array(drawn(2, 4000, second, 0.4))
    assert (lengths <= found.arrive(100).quantile(0.9)).mean() > 0.84
    assert found.arrive(100).quantile(0.5) == pytest.approx(second, rel=0.3)


def test_tables_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecaster, "MOST_ROWS", 32)
    found = LengthForecaster(LONGEST)
    kept: list[Forecast] = []
    for number in range(300):
        kept.append(found.arrive(1 + 37 * number, [number]))
        if number % 3 == 2:
            found.finish(kept.pop(0), 1 + number, [number, -number])
    assert len(found._table) == 32
    assert found._table.cells.shape[0] == 32
    # Rows of requests that all share are never among the least recently used.
    assert found._table.rows([0, 1, 2]).places.tolist() == [0, 1, 2]
    # A row that was given up begins anew, so nothing is written into another's.
    for forecast in kept:
        found.finish(forecast, 5)
    cells = found._table.cells
    assert (cells[:, 0] <= cells[:, 1] + 1e-9).all()


def test_what_has_faded_is_gone() -> None:
    """Numbers that only get smaller would end as denormal ones, which are slow."""
    found = LengthForecaster(LONGEST)
    train(found, [1])
    train(found, [300] * 3000)
    cells = found._table.cells
    assert found._table.rows([0]).places.tolist() == [0]
    assert cells[0, 0, 0] == 0.0  # 0.98 ** 3000 is 5e-27
    assert cells[cells > 0].min() > hazards.FADED / 1e3
    assert cells[1, 0, 0] == pytest.approx(0.999**3000)


def test_conversations_are_bounded() -> None:
    found = forecaster.Conversations(most=3, most_hashes=2)
    for number in range(5):
        found.note([number], 10 + number, 1)
    assert len(found) == 3
    assert found.look_up([0, 1]) is None
    assert found.look_up([4, 3]) == (13, 1)
    assert found.look_up([4, 8, 9]) is None  # only the last two are looked up
    found.note([], 10, 1)
    assert len(found) == 3
    found.note(["new"], 1, 1)  # 2 went: 3 was used behind it
    assert found.look_up([2]) is None
    assert found.look_up([3]) is not None


def test_the_longest_conversation_is_gone_on_with() -> None:
    found = forecaster.Conversations()
    found.note(["a", "b"], 10, 1)
    found.note(["a", "b", "c", "d"], 20, 2)
    assert found.look_up(["a", "b", "c", "d", "e"]) == (20, 2)
    assert found.look_up(["a", "b", "x"]) == (10, 1)
    assert found.look_up(["a"]) is None


@given(st.integers(1, 10**7), st.integers(0, 10**6), st.integers(1, 10**7))
def test_levels_share_no_key(prompt: int, turn: int, previous: int) -> None:
    found = keys(Known(prompt, turn, previous if turn else None))
    assert len(set(found)) == 9
    assert [key >> 16 for key in found] == list(range(1, 10))
    assert not set(found) & set(range(len(MEMORIES)))


@given(REQUESTS)
@settings(max_examples=10, deadline=None)
def test_the_same_calls_give_the_same_bits(requests: list[tuple[int, int, int, int]]) -> None:
    found = []
    for _ in range(2):
        model = LengthForecaster(LONGEST)
        curves = []
        for prompt, turn, previous, length in requests:
            forecast = model.forecast(Known(prompt, turn, previous if turn else None))
            curves.append(forecast.curve.tobytes())
            model.finish(forecast, length)
        found.append(curves)
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_that_of_what_was_forecast(seed: int) -> None:
    """Against each forecast's own quantiles and curves, one by one."""
    found = LengthForecaster(LONGEST)
    within, loss = [0, 0], 0.0
    rng = np.random.default_rng(seed)
    octaves = [0, *(2**power for power in range(12))]
    for length in drawn(seed, 400):
        forecast = found.arrive(int(rng.integers(1, 500)))
        within[0] += length <= forecast.quantile(0.5)
        within[1] += length <= forecast.quantile(0.9)
        low = max(each for each in octaves if each < length)
        loss -= math.log(
            found.bins.at(forecast.curve, low) - found.bins.at(forecast.curve, max(2 * low, 1))
        )
        found.finish(forecast, length)
    assert found.score.answers == 400
    assert found.score.within == within
    assert found.score.loss == pytest.approx(loss)
    assert found.score.general_loss > 0


def test_a_limit_ends_every_forecast() -> None:
    found = LengthForecaster(LONGEST)
    free, capped = found.arrive(100), found.arrive(100)
    capped.cap(50)
    for length in range(50):
        assert capped.survival(length) <= free.survival(length) + 1e-12
    assert capped.survival(64) == 0
    assert free.survival(64) > 0
    assert capped.quantile(0.999) <= 64
