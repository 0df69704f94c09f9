"""What forecasts: AVMP's forecaster, and what it must not lose against.

A model is asked when a request arrives and told what became of it. It answers with a curve over the
forecaster's bins, so that all are judged by the same rules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from avmp_vllm.bench.predict.answers import Answer
from avmp_vllm.predict.bins import Floats, LengthBins
from avmp_vllm.predict.forecaster import PER_OCTAVE, Forecast, LengthForecaster
from avmp_vllm.predict.hazards import HazardTable


class Model(Protocol):
    """Something that forecasts."""

    def arrive(self, index: int, answer: Answer) -> Floats:
        """The curve of a request's answer; nothing but its prompt may be looked at."""
        ...

    def progress(self, index: int, tokens: int) -> None:
        """It has got so far and goes on."""
        ...

    def finish(self, index: int, answer: Answer) -> None:
        """It ended."""
        ...


class Mixed:
    """AVMP's forecaster."""

    def __init__(self, longest: int) -> None:
        self.forecaster = LengthForecaster(longest)
        self.live: dict[int, Forecast] = {}

    def arrive(self, index: int, answer: Answer) -> Floats:
        """By the prompt's length and the conversation's last answer."""
        forecast = self.forecaster.arrive(answer.prompt, answer.prompt_hashes)
        self.live[index] = forecast
        return forecast.curve

    def progress(self, index: int, tokens: int) -> None:
        """Exposure."""
        self.forecaster.progress(self.live[index], tokens)

    def finish(self, index: int, answer: Answer) -> None:
        """Learn."""
        self.forecaster.finish(self.live.pop(index), answer.tokens, answer.hashes)


class Remembered:
    """The same survival model without features: one row of all requests.

    Args:
        longest: Longest answer.
        memory: Answers that it remembers.
    """

    def __init__(self, longest: int, memory: float) -> None:
        self._bins = LengthBins(longest, PER_OCTAVE)
        self._table = HazardTable(self._bins, 1)
        self._row = self._table.rows([0])
        self._keep = np.array([1.0 - 1.0 / memory])
        self._passed: dict[int, int] = {}

    def arrive(self, index: int, answer: Answer) -> Floats:
        """The same for everybody."""
        self._passed[index] = 0
        hazards = self._table.hazards(self._row, 1, 1)
        curve: Floats = self._table.curves(hazards)[0]
        return curve

    def progress(self, index: int, tokens: int) -> None:
        """Exposure."""
        passed, _ = self._bins.passed(tokens)
        self._table.expose(self._row, self._passed[index], passed)
        self._passed[index] = passed

    def finish(self, index: int, answer: Answer) -> None:
        """Learn."""
        end = self._bins.bin(answer.tokens)
        self._table.learn(self._row, min(self._passed.pop(index), end), end, self._keep)


class Counted:
    """How often each bin was ended in so far, without forgetting: the base rate."""

    def __init__(self, longest: int) -> None:
        self._bins = LengthBins(longest, PER_OCTAVE)
        self._ended = np.full(self._bins.count, 1.0 / self._bins.count)

    def arrive(self, index: int, answer: Answer) -> Floats:
        """The same for everybody."""
        curve = 1.0 - np.concatenate([[0.0], np.cumsum(self._ended)]) / self._ended.sum()
        curve[-1] = 0.0
        return curve

    def progress(self, index: int, tokens: int) -> None:
        """Not used: it counts what has ended."""

    def finish(self, index: int, answer: Answer) -> None:
        """Count."""
        self._ended[self._bins.bin(answer.tokens)] += 1.0


#: AVMP's, and the two that its log-loss is compared with.
MIXED = "forecast"
GLOBAL = {"global 200": 200.0, "global 1000": 1000.0}
SHORT, LONG = GLOBAL
COUNTED = "counts so far"
MODELS: dict[str, Callable[[int], Model]] = {
    MIXED: Mixed,
    SHORT: lambda longest: Remembered(longest, GLOBAL[SHORT]),
    LONG: lambda longest: Remembered(longest, GLOBAL[LONG]),
    COUNTED: Counted,
}
