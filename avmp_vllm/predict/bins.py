"""Bins of lengths: every length of its own up to ``2 * per_octave``, logarithmic from there.

Bin ``b`` holds the lengths ``edges[b] < length <= edges[b + 1]``; a *curve* has one value an edge,
``curve[b] = P(length > edges[b])``, so ``curve[0]`` is 1. Between two edges a curve is a straight
line: within a bin every length is as likely as any other.

::

    edges    0   1   2  ...  16    18    20   ...         longest
    bins       0   1   2 ...    16    17    18    ...    count - 1
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class LengthBins:
    """Where the bins of a forecaster begin and end.

    Args:
        longest: Longest length in tokens; what is longer counts as this.
        per_octave: Bins from a length to its double, a power of two: so octaves begin at edges.

    Attributes:
        edges: Lengths at which bins end, ``count + 1`` of them, the first 0.
        count: Bins.
        longest: As given.
    """

    def __init__(self, longest: int, per_octave: int) -> None:
        if longest < 1 or per_octave < 1 or per_octave & (per_octave - 1):
            raise ValueError(
                f"longest {longest} must be at least 1 and per_octave {per_octave} a power of two"
            )
        edges = list(range(min(2 * per_octave, longest) + 1))
        step = 2.0 ** (1 / per_octave)
        place = float(edges[-1])
        while edges[-1] < longest:
            place *= step
            edges.append(min(max(round(place), edges[-1] + 1), longest))
        self.edges: Floats = np.array(edges, dtype=np.float64)
        self.count = len(edges) - 1
        self.longest = longest
        widths = np.diff(self.edges).astype(np.int64)
        # Of every length: its bin; then how far into it a length is, as the line between edges has.
        bin_of = np.repeat(np.arange(self.count), widths)
        self._bin = np.concatenate([[0], bin_of])
        lengths = np.arange(longest + 1)
        self._low = np.concatenate([bin_of, [self.count - 1]])
        self._below: NDArray[np.int64] = np.concatenate([bin_of, [self.count]])
        self._part = (lengths - self.edges[self._low]) / np.diff(self.edges)[self._low]

    def bin(self, length: int) -> int:
        """Bin of a length of at least 1."""
        return int(self._bin[min(length, self.longest)])

    def passed(self, length: int) -> tuple[int, float]:
        """Whole bins that an answer of so many tokens is through, and the part of the next one."""
        length = min(length, self.longest)
        return int(self._low[length]), float(self._part[length])

    def at(self, curve: Floats, length: int) -> float:
        """P(length > ``length``) by a curve."""
        length = min(length, self.longest)
        low = self._low[length]
        return float(curve[low] + self._part[length] * (curve[low + 1] - curve[low]))

    def below(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of many lengths: the edge below; the last edge for those beyond the longest."""
        found: NDArray[np.int64] = self._below.take(lengths, mode="clip")
        return found

    def quantile(self, curve: Floats, share: float, generated: int = 0) -> int:
        """Least length that an answer stays within with probability ``share``.

        Args:
            curve: Of the answer.
            share: Between 0 and 1.
            generated: Tokens that it has already; it goes on behind them.
        """
        target = (1.0 - share) * self.at(curve, generated)
        # Curves fall; the first edge at which it is low enough ends the bin.
        high = int(np.searchsorted(-curve, -target))
        if high > self.count:
            return self.longest
        if high == 0:
            return generated + 1
        above, below = float(curve[high - 1]), float(curve[high])
        part = (above - target) / (above - below) if above > below else 1.0
        low, top = float(self.edges[high - 1]), float(self.edges[high])
        length = int(np.ceil(low + part * (top - low) - 1e-9))
        return min(max(length, generated + 1), self.longest)

    def mean(self, curve: Floats) -> float:
        """Expected length."""
        return float(np.trapezoid(curve, self.edges)) + 0.5
