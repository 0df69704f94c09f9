"""Adaptive buckets: sizes of contiguous reservations that follow what is asked for.

Where a request's KV must be contiguous, room is reserved before its length is known. A forecast
asks for the length that an answer stays within with probability ``share``; that is rounded up to
one of a few bucket sizes, which are chosen anew from a decaying histogram of what was asked for, so
that rounding wastes least. Answers that would leave most of their bucket empty are *uncertain* and
go to a fallback pool, which hands out small pieces as they grow; so does what outgrows its bucket.

After ODMA (arXiv:2512.09427), which predicts a bucket with a trained model and keeps a pool for the
rest.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from avmp_vllm.predict.bins import Floats, LengthBins
from avmp_vllm.predict.forecaster import Forecast

#: Requests that the histogram remembers, after how many sizes are chosen anew, and how many must
#: have been seen before there is any size.
MEMORY = 1000.0
RENEW = 64
COLD = 64
#: What was asked for less than this, decayed, has no bucket.
FORGOTTEN = 0.5


class Placement(NamedTuple):
    """Where an answer goes.

    Attributes:
        size: Tokens of its bucket, or 0 in the fallback pool.
        asked: Tokens that the forecast asked for.
    """

    size: int
    asked: int


class AdaptiveBuckets:
    """Bucket sizes by an online histogram, and who goes where.

    Args:
        bins: Of the forecasts.
        count: Buckets.
        share: Of answers that are to fit what is asked for.
        least_fill: An answer that is expected to fill less of its bucket goes to the fallback pool.

    Attributes:
        sizes: Of the buckets, ascending; empty until enough has been asked for.
    """

    def __init__(
        self, bins: LengthBins, count: int = 8, share: float = 0.9, least_fill: float = 0.0
    ) -> None:
        if count < 1 or not 0 < share < 1 or not 0 <= least_fill < 1:
            raise ValueError(f"count {count}, share {share} or least_fill {least_fill}")
        self._bins = bins
        self._count = count
        self._share = share
        self._least_fill = least_fill
        self._asked: Floats = np.zeros(bins.count)
        self._seen = 0
        self.sizes: list[int] = []

    def place(self, forecast: Forecast) -> Placement:
        """Where a request's answer goes; what it asks for is noted."""
        asked = forecast.quantile(self._share)
        size = next((size for size in self.sizes if size >= asked), 0)
        if size and self._least_fill:
            used = self.expected_use(forecast.curve, size)
            if used < self._least_fill * size:
                size = 0
        self._note(asked)
        return Placement(size, asked)

    def expected_use(self, curve: Floats, size: int) -> float:
        """Expected tokens in a bucket: of the answer, or all of it where the answer is longer."""
        edges = self._bins.edges
        last = int(np.searchsorted(edges, size))
        lengths = np.append(edges[:last], size)
        values = np.append(curve[:last], self._bins.at(curve, size))
        return float(np.trapezoid(values, lengths))

    def _note(self, asked: int) -> None:
        self._asked *= 1.0 - 1.0 / MEMORY
        self._asked[self._bins.bin(asked)] += 1.0
        self._seen += 1
        if self._seen >= COLD and self._seen % RENEW == 0:
            self.sizes = best_sizes(self._bins.edges, self._asked, self._count)


def best_sizes(edges: Floats, asked: Floats, count: int) -> list[int]:
    """The sizes that waste least when what is asked for is rounded up to one of them.

    Args:
        edges: Of the bins, ``[bins + 1]``.
        asked: How much was asked for in each bin, ``[bins]``, as if for the bin's end.
        count: Most sizes.

    Returns:
        Ends of bins, ascending; the last holds all that was asked for and not forgotten.
    """
    held = np.flatnonzero(asked >= FORGOTTEN)
    if not len(held):
        return []
    ends, mass = edges[1:][held], asked[held]
    before = np.concatenate([[0.0], np.cumsum(mass)])
    tokens = np.concatenate([[0.0], np.cumsum(mass * ends)])
    # waste[i, j]: of bins i to j - 1 in one bucket of the last one's size; the rest is impossible.
    whole = len(ends)
    waste = np.full((whole + 1, whole + 1), np.inf)
    for j in range(1, whole + 1):
        rows = np.arange(j)
        waste[rows, j] = ends[j - 1] * (before[j] - before[rows]) - (tokens[j] - tokens[rows])
    best = waste[0]
    chosen: list[list[int]] = []
    for _ in range(min(count, whole) - 1):
        through = best[:, None] + waste
        chosen.append(through.argmin(axis=0).tolist())
        best = through.min(axis=0)
    sizes, place = [int(ends[-1])], whole
    for back in reversed(chosen):
        place = back[place]
        sizes.append(int(ends[place - 1]))
    return sizes[::-1]
