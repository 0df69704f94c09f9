"""Judging forecasts: log-loss, coverage, error, rank correlation.

Log-loss is over five buckets that cut the whole trace's answers into fifths, in nats; who knows
nothing but the cuts has ln 5 = 1.609. The cuts are hindsight, and the same for all models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avmp_vllm.bench.predict.answers import Load
from avmp_vllm.predict.bins import Floats, LengthBins

BUCKETS = 5
#: Requests that count as a cold start, and as the time right after a change.
COLD = 100
AFTER = 500
#: The remaining length is judged once so much has been generated.
GENERATED = (0, 128, 256)
LEAST = 1e-9


def cuts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Lengths at which the buckets end, without the last; each is the last of its bucket."""
    shares = np.arange(1, BUCKETS) / BUCKETS
    return np.unique(np.floor(np.quantile(lengths, shares)).astype(np.int64))


def ranks(values: Floats) -> Floats:
    """Ranks; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Floats = (last - (counts - 1) / 2.0)[inverse]
    return means


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation; 0 where either is constant."""
    first, second = ranks(one), ranks(other)
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


@dataclass
class Judge:
    """What one model forecast of every request.

    Attributes:
        bins: Of its curves.
        edges: Buckets' ends with 0 and the longest.
    """

    bins: LengthBins
    edges: NDArray[np.int64]
    _loss: list[float] = field(default_factory=list)
    _quantiles: list[tuple[int, int]] = field(default_factory=list)
    _further: list[list[float]] = field(default_factory=list)

    def note(self, curve: Floats, length: int) -> None:
        """Note a forecast, in order of arrival, beside what came."""
        bucket = int(np.searchsorted(self.edges, length)) - 1
        low, high = self.edges[bucket], self.edges[bucket + 1]
        probability = self.bins.at(curve, int(low)) - self.bins.at(curve, int(high))
        self._loss.append(-math.log(max(probability, LEAST)))
        median, most = (self.bins.quantile(curve, share) for share in (0.5, 0.9))
        self._quantiles.append((median, most))
        self._further.append(
            [
                abs(self.bins.quantile(curve, 0.5, generated) - length)
                if length > generated
                else math.nan
                for generated in GENERATED
            ]
        )

    def summary(self, load: Load) -> dict[str, Any]:
        """Figures of the whole load, of its cold start, and of each part."""
        lengths = np.array([answer.tokens for answer in load.answers], dtype=np.float64)
        loss, quantiles = np.array(self._loss), np.array(self._quantiles, dtype=np.float64)
        within = quantiles >= lengths[:, None]
        bounds = [*load.starts, len(lengths)]
        parts = []
        for begin, end in pairwise(bounds):
            soon = slice(begin, min(begin + AFTER, end))
            parts.append(
                {
                    "log_loss": _round(loss[begin:end].mean()),
                    "p90": _round(within[begin:end, 1].mean()),
                    "log_loss_after": _round(loss[soon].mean()),
                    "p90_after": _round(within[soon, 1].mean()),
                }
            )
        return {
            "log_loss": _round(loss.mean()),
            "cold_log_loss": _round(loss[:COLD].mean()),
            "p50": _round(within[:, 0].mean()),
            "p90": _round(within[:, 1].mean()),
            "error": _round(np.abs(quantiles[:, 0] - lengths).mean()),
            "remaining_error": [_round(value) for value in np.nanmean(self._further, axis=0)],
            "spearman": _round(spearman(quantiles[:, 0], lengths)),
            "parts": parts,
        }


def _round(value: float) -> float:
    """Figures are compared with a file's; the last digits are not worth a difference."""
    return round(float(value), 6)
