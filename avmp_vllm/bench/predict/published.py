"""Figures that others published, to stand beside ours. None is measured here.

The seed is ODMA (arXiv:2512.09427). Its accuracy is that of a predicted bucket, and its utilisation
is against static allocation of the longest answer; how either is counted was found in no text of
it, so they show what was claimed and compare with nothing.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A figure and where it stands.

    Attributes:
        source: Of the figure.
        what: That was measured.
        before: Of what it was compared with, in per cent; None where there is none.
        after: Of the proposal.
    """

    source: str
    what: str
    before: float | None
    after: float


PUBLISHED = (
    Published("ODMA", "accuracy, Alpaca", 98.60, 99.55),
    Published("ODMA", "accuracy, Google NQ", 82.68, 93.36),
    Published("ODMA", "utilisation, Alpaca", 55.05, 72.45),
    Published("ODMA", "utilisation, Google NQ", 42.54, 61.79),
    Published("S3", "accuracy of ten buckets, Google NQ", None, 77.13),
)
