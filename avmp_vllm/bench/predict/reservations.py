"""Contiguous reservations: how much is reserved for an answer before its length is known.

Of each rule two figures, which mean nothing without one another:

    fit     answers that stayed within what was reserved, of those that had a bucket
    fill    tokens of all answers / tokens reserved for all answers

An answer that outgrows its bucket is charged that bucket and a place in the fallback pool, where it
moves; one that had no bucket is charged the pool alone. The pool hands out pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.buckets import AdaptiveBuckets
from avmp_vllm.predict.forecaster import Forecast

#: Tokens of the fallback pool's pieces, and of a page.
PIECE, PAGE = 64, 16
#: S3's buckets: so many equal ones up to this length.
S3_BUCKETS, S3_LONGEST = 10, 2048
CONSTANTS = (256, 512, 1024, 2048)
#: An answer that is expected to fill less of its bucket goes to the pool, where there is one.
LEAST_FILL = 0.4


def pieces(tokens: int, piece: int = PIECE) -> int:
    """Tokens of whole pieces."""
    return -(-tokens // piece) * piece


def s3_bucket(tokens: int) -> int:
    """Which of S3's buckets a length falls into; what is longer falls into the last."""
    return min(-(-tokens * S3_BUCKETS // S3_LONGEST), S3_BUCKETS) - 1


def s3_end(bucket: int) -> int:
    """Last length of one of S3's buckets."""
    return (bucket + 1) * S3_LONGEST // S3_BUCKETS


class Rule(Protocol):
    """Says how much to reserve."""

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """Tokens for an answer; 0: none in a bucket.

        Args:
            mixed: AVMP's forecast.
            general: That of all requests alike.
        """
        ...

    def finish(self, tokens: int) -> None:
        """An answer ended."""
        ...


@dataclass
class Constant:
    """The same for everybody."""

    tokens: int

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """It."""
        return self.tokens

    def finish(self, tokens: int) -> None:
        """Nothing is learned."""


class Mean:
    """The mean of what has ended, to the next whole token."""

    def __init__(self) -> None:
        self._sum = self._count = 0

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """None before anything has ended."""
        return -(-self._sum // self._count) if self._count else 0

    def finish(self, tokens: int) -> None:
        """Learn."""
        self._sum += tokens
        self._count += 1


class Majority:
    """S3's bucket that most answers so far ended in."""

    def __init__(self) -> None:
        self._ended = [0] * S3_BUCKETS

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """The first of several that are as frequent."""
        return s3_end(self._ended.index(max(self._ended)))

    def finish(self, tokens: int) -> None:
        """Learn."""
        self._ended[s3_bucket(tokens)] += 1


class LikeliestOfTen:
    """S3's bucket that the forecast finds likeliest."""

    def __init__(self, bins: LengthBins) -> None:
        self._bins = bins

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """The last holds everything that is longer."""
        at = [self._bins.at(mixed.curve, s3_end(bucket)) for bucket in range(S3_BUCKETS - 1)]
        falls = -np.diff([1.0, *at, 0.0])
        return s3_end(int(np.argmax(falls)))

    def finish(self, tokens: int) -> None:
        """The forecaster learns."""


class TenAtShare:
    """S3's bucket that an answer stays within with some probability."""

    def __init__(self, share: float) -> None:
        self._share = share

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """By AVMP's forecast."""
        return s3_end(s3_bucket(mixed.quantile(self._share)))

    def finish(self, tokens: int) -> None:
        """The forecaster learns."""


class Adaptive:
    """Adaptive buckets.

    Args:
        bins: Of the forecasts.
        share: Of answers that are to fit.
        by_forecast: By AVMP's forecast; else by that of all requests alike.
        least_fill: Of ``AdaptiveBuckets``.
    """

    def __init__(
        self, bins: LengthBins, share: float, by_forecast: bool, least_fill: float = 0.0
    ) -> None:
        self._buckets = AdaptiveBuckets(bins, share=share, least_fill=least_fill)
        self._by_forecast = by_forecast

    def reserve(self, mixed: Forecast, general: Forecast) -> int:
        """Of the bucket; 0 in the fallback pool."""
        return self._buckets.place(mixed if self._by_forecast else general).size

    def finish(self, tokens: int) -> None:
        """The forecaster learns."""


RULES: dict[str, Callable[[LengthBins], Rule]] = {
    **{f"constant {tokens}": lambda _, t=tokens: Constant(t) for tokens in CONSTANTS},  # type: ignore[misc]
    "mean so far": lambda _: Mean(),
    "S3's ten, majority": lambda _: Majority(),
    "S3's ten, likeliest": LikeliestOfTen,
    "S3's ten, P90": lambda _: TenAtShare(0.9),
    "eight adaptive, global P90": lambda bins: Adaptive(bins, 0.9, False),
    "eight adaptive, global P99": lambda bins: Adaptive(bins, 0.99, False),
    "eight adaptive, P90": lambda bins: Adaptive(bins, 0.9, True),
    "eight adaptive, P99": lambda bins: Adaptive(bins, 0.99, True),
    "eight adaptive, P90, pool": lambda bins: Adaptive(bins, 0.9, True, LEAST_FILL),
}
PAGED = f"pages of {PAGE}"


@dataclass
class Ledger:
    """What a rule's reservations came to."""

    answers: int = 0
    in_buckets: int = 0
    fitted: int = 0
    right_of_ten: int = 0
    tokens: int = 0
    reserved: int = 0

    def note(self, reserved: int, tokens: int) -> None:
        """Note an answer of so many tokens."""
        self.answers += 1
        self.tokens += tokens
        self.in_buckets += reserved > 0
        self.fitted += 0 < reserved >= tokens
        self.right_of_ten += reserved > 0 and s3_bucket(reserved) == s3_bucket(tokens)
        self.reserved += reserved if tokens <= reserved else reserved + pieces(tokens)

    def summary(self) -> dict[str, Any]:
        """Fit, fill, share in buckets, and how often the right one of S3's ten was named."""
        return {
            "fit": round(self.fitted / max(self.in_buckets, 1), 6),
            "fill": round(self.tokens / self.reserved, 6),
            "in_buckets": round(self.in_buckets / self.answers, 6),
            "right_of_ten": round(self.right_of_ten / self.answers, 6),
        }


def paged(lengths: list[int]) -> dict[str, Any]:
    """What pages come to, for comparison: no answer outgrows them."""
    reserved = sum(pieces(tokens, PAGE) for tokens in lengths)
    fill = round(sum(lengths) / reserved, 6)
    return {"fit": 1.0, "fill": fill, "in_buckets": 0.0, "right_of_ten": 0.0}
