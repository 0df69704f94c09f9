"""Forecasts of answer lengths, learned online from nothing.

The forecaster sees requests arrive, grow and end, in that order and nothing else: no clock, no
randomness, no text, no other model. See the package's docstring for who calls what.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from avmp_vllm.predict.bins import Floats, LengthBins
from avmp_vllm.predict.conversations import Conversations
from avmp_vllm.predict.features import DEPTH, LADDERS, Known, keys
from avmp_vllm.predict.hazards import HazardTable, Rows
from avmp_vllm.predict.mixture import Mixture
from avmp_vllm.predict.score import SHARES, Score

#: Bins from a length to its double.
PER_OCTAVE = 4
#: Answers that a row remembers: of all requests one that follows drift at once, one that has seen
#: much, and one between them, on which the features stand; then of each other row.
MEMORIES = (50.0, 1000.0, 200.0)
#: Of these, the one that the score compares with.
GENERAL = 1
ROW_MEMORY = 1000.0
#: A running answer counts as exposure at this length, and at each double of it.
FIRST_PROGRESS = 16
#: A limit that an answer reaches with less than this probability is left alone.
UNLIKELY = 1e-3
#: Rows of the features' classes that are kept.
MOST_ROWS = 4096


class Forecast:
    """What was forecast of one answer when its request arrived.

    Attributes:
        curve: P(length > edge), ``[edges]``.
        known: What was known of the request.
        next_progress: Length at which the forecaster wants to hear of it next.
    """

    __slots__ = (
        "_bins",
        "_passed",
        "_reached",
        "_rows",
        "_weights",
        "curve",
        "known",
        "next_progress",
    )

    def __init__(
        self,
        bins: LengthBins,
        known: Known,
        rows: Rows,
        curve: Floats,
        reached: Floats,
        weights: Floats,
    ) -> None:
        self._bins = bins
        self._rows = rows
        self._reached = reached
        self._weights = weights
        self._passed = 0
        self.known = known
        self.curve = curve
        self.next_progress = FIRST_PROGRESS

    @classmethod
    def of(cls, bins: LengthBins, known: Known, curve: Floats) -> Forecast:
        """A forecast that no forecaster made, and none can learn from."""
        nothing = Rows([], np.zeros(0, dtype=np.intp), 0)
        return cls(bins, known, nothing, curve, np.zeros((0, 0)), np.zeros(0))

    def cap(self, limit: int) -> None:
        """The answer is cut off at ``limit`` tokens, whatever else is known of it."""
        if self._bins.at(self.curve, limit) < UNLIKELY:
            return
        beyond = int(np.searchsorted(self._bins.edges, limit))
        self.curve = np.append(self.curve[:beyond], np.zeros(len(self.curve) - beyond))

    def survival(self, more: int, generated: int = 0) -> float:
        """P(length > generated + more | length > generated)."""
        now = self._bins.at(self.curve, generated)
        if now <= 0.0:
            return 0.0
        return self._bins.at(self.curve, generated + more) / now

    def quantile(self, share: float, generated: int = 0) -> int:
        """Length that it stays within with probability ``share``, if it has got this far."""
        return self._bins.quantile(self.curve, share, generated)

    def mean(self) -> float:
        """Expected length."""
        return self._bins.mean(self.curve)


class LengthForecaster:
    """Forecasts answers, and learns from each that ends.

    Args:
        longest: Longest answer in tokens.

    Attributes:
        bins: Of the lengths.
        score: Of the forecasts of answers that were learned from.
    """

    def __init__(self, longest: int) -> None:
        self.bins = LengthBins(longest, PER_OCTAVE)
        self.score = Score()
        self.conversations = Conversations()
        models = len(MEMORIES) + LADDERS * DEPTH
        self._table = HazardTable(self.bins, MOST_ROWS)
        self._mixture = Mixture(self.bins, models)
        memories = np.array([*MEMORIES, *[ROW_MEMORY] * (models - len(MEMORIES))])
        self._keep: Floats = 1.0 - 1.0 / memories
        self._general = list(range(len(MEMORIES)))

    @property
    def weights(self) -> Floats:
        """Weight of each model: the memories of all requests, then ladders by grain."""
        return self._mixture.weights

    def arrive(self, prompt_tokens: int, hashes: Sequence[Hashable] = ()) -> Forecast:
        """Forecast a request's answer.

        Args:
            prompt_tokens: Of its prompt.
            hashes: Of its prompt's full blocks, if prefixes are hashed.
        """
        before = self.conversations.look_up(hashes)
        turn, previous = (0, None) if before is None else (before.turn, before.tokens)
        return self.forecast(Known(prompt_tokens, turn, previous))

    def forecast(self, known: Known) -> Forecast:
        """Forecast an answer by what is known of its request."""
        rows = self._table.rows(self._general + keys(known))
        curves = self._curves(rows)
        reached = curves.take(self._mixture.octaves, axis=1)
        mixture = self._mixture
        return Forecast(self.bins, known, rows, mixture.mean(curves), reached, mixture.weights)

    def _curves(self, rows: Rows) -> Floats:
        """What each model forecasts, ``[models, edges]``."""
        hazards = self._table.hazards(rows, len(MEMORIES), LADDERS)
        return self._table.curves(hazards)

    def progress(self, forecast: Forecast, generated: int) -> None:
        """Note that a running answer has grown; worth a call once it has ``next_progress`` tokens.

        Without this the short answers, which end first, would be all that is learned of a load that
        has just begun or changed.
        """
        passed, _ = self.bins.passed(generated)
        if passed > forecast._passed:
            forecast._rows = self._table.current(forecast._rows)
            self._table.expose(forecast._rows, forecast._passed, passed)
            forecast._passed = passed
        while forecast.next_progress <= generated:
            forecast.next_progress *= 2

    def finish(self, forecast: Forecast, generated: int, hashes: Sequence[Hashable] = ()) -> None:
        """Learn from an answer that ended by itself.

        Args:
            forecast: Of its request.
            generated: Its length, at least 1.
            hashes: Of the full blocks of prompt and answer.
        """
        end = self.bins.bin(generated)
        rows = self._table.current(forecast._rows)
        self._table.learn(rows, min(forecast._passed, end), end, self._keep)
        probability = self._mixture.judge(forecast._reached, generated, ended=True)
        score = self.score
        score.answers += 1
        score.loss -= math.log(forecast._weights @ probability)
        score.general_loss -= math.log(probability[GENERAL])
        # An answer is within a quantile if the length right below it is not beyond.
        beyond = self.bins.at(forecast.curve, generated - 1)
        for index, share in enumerate(SHARES):
            score.within[index] += beyond > 1.0 - share
        self.conversations.note(hashes, generated, forecast.known.turn + 1)

    def stop(self, forecast: Forecast, generated: int, hashes: Sequence[Hashable] = ()) -> None:
        """Learn from an answer that was cut off or given up: it would have been longer.

        Args:
            forecast: Of its request.
            generated: Its length so far.
            hashes: Of the full blocks of prompt and answer, where the conversation may go on.
        """
        self.progress(forecast, generated)
        if generated:
            self._mixture.judge(forecast._reached, generated, ended=False)
            turn = forecast.known.turn + 1
            self.conversations.note(hashes, generated, turn)
