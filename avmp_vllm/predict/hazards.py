"""Hazards: how often an answer that reached a bin ended in it, by row, with forgetting.

A row is one way to group answers ("prompts of 512 to 1,023 tokens"). Of each bin it has

    events     answers that ended in the bin
    exposure   answers that reached it, whatever became of them

so that events / exposure is the *hazard*, the probability to end in a bin once it is reached. An
answer that still runs, was cut off or was given up counts as exposure of the bins it is through and
as nobody's event: it is censored. Each ended answer takes a share of 1 / memory from what its rows
knew before.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avmp_vllm.predict.bins import Floats, LengthBins

#: The distribution that is assumed before anything is known: Lomax of shape 1, so that half of all
#: answers are longer than its scale, and it counts as much as so many answers.
PRIOR_SCALE = 128.0
PRIOR_WORTH = 8.0
#: Answers that the coarser row above a row counts as, in every bin.
PARENT_WORTH = 8.0
#: What has faded below this is forgotten: numbers that get too small make a processor slow. Looked
#: at with every so many answers.
FADED = 1e-12
FADED_EVERY = 16


class Rows(NamedTuple):
    """Where some keys' rows are.

    Attributes:
        keys: As asked for.
        places: Indices of their rows.
        evicted: Rows that the table had given up when it was asked.
    """

    keys: list[int]
    places: NDArray[np.intp]
    evicted: int


class HazardTable:
    """Rows of events and exposure; the least recently used row goes when there are too many.

    Args:
        bins: Of the lengths.
        most: Rows that are kept at most.

    Attributes:
        cells: Events and exposure of each row, ``[rows, 2, bins]``.
    """

    def __init__(self, bins: LengthBins, most: int) -> None:
        self._bins = bins
        self._most = most
        self._evicted = 0
        self._learned = 0
        self._row_of: OrderedDict[int, int] = OrderedDict()
        self.cells: Floats = np.zeros((min(most, 64), 2, bins.count))
        reach = 1.0 / (1.0 + bins.edges / PRIOR_SCALE)
        self._prior_exposure: Floats = PRIOR_WORTH * reach[:-1]
        self._prior_events: Floats = PRIOR_WORTH * (reach[:-1] - reach[1:])

    def __len__(self) -> int:
        return len(self._row_of)

    def rows(self, keys: list[int]) -> Rows:
        """Rows of some keys, which are different from one another; empty ones for new keys."""
        found = []
        for key in keys:
            row = self._row_of.get(key)
            if row is None:
                row = self._new(key)
            else:
                self._row_of.move_to_end(key)
            found.append(row)
        return Rows(keys, np.array(found, dtype=np.intp), self._evicted)

    def current(self, rows: Rows) -> Rows:
        """The same keys' rows now; a row that was given up since begins anew."""
        return rows if rows.evicted == self._evicted else self.rows(rows.keys)

    def _new(self, key: int) -> int:
        row = len(self._row_of)
        if row == self._most:
            _, row = self._row_of.popitem(last=False)
            self.cells[row] = 0.0
            self._evicted += 1
        elif row == len(self.cells):
            grown = np.zeros((min(2 * row, self._most), *self.cells.shape[1:]))
            grown[:row] = self.cells
            self.cells = grown
        self._row_of[key] = row
        return row

    def expose(self, rows: Rows, begin: int, end: int) -> None:
        """Note an answer that got through bins ``begin`` to ``end - 1`` and goes on."""
        self.cells[rows.places, 1, begin:end] += 1.0

    def learn(self, rows: Rows, begin: int, end: int, keep: Floats) -> None:
        """Note an answer that reached bin ``begin`` before, and now ended in bin ``end``.

        Args:
            rows: That it belongs to.
            begin: First bin that it has not been exposed to yet.
            end: Bin of its length.
            keep: Share of what each row knew that is kept, ``[rows]``.
        """
        cells = self.cells.take(rows.places, axis=0)
        cells *= keep[:, None, None]
        self._learned += 1
        if self._learned % FADED_EVERY == 0:
            cells[cells < FADED] = 0.0
        cells[:, 1, begin : end + 1] += 1.0
        cells[:, 0, end] += 1.0
        self.cells[rows.places] = cells

    def hazards(self, rows: Rows, general: int, breadth: int) -> Floats:
        """Hazards of rows, ``[rows, bins]``.

        Args:
            rows: The first stand on the prior, the others on what is ``breadth`` rows before them;
                the first ``breadth`` of those on the last of the first.
            general: How many stand on the prior.
            breadth: Rows of a level.
        """
        cells = self.cells.take(rows.places, axis=0)
        events, exposure = cells[:, 0], cells[:, 1]
        events[:general] += self._prior_events
        exposure[:general] += self._prior_exposure
        exposure[general:] += PARENT_WORTH
        events[:general] /= exposure[:general]
        parents = events[general - 1]
        for begin in range(general, len(events), breadth):
            level = events[begin : begin + breadth]
            level += PARENT_WORTH * parents
            level /= exposure[begin : begin + breadth]
            parents = level
        return events

    @staticmethod
    def curves(hazards: Floats) -> Floats:
        """Curves of hazards, ``[rows, edges]``; nothing is longer than the longest."""
        curves = np.empty((len(hazards), hazards.shape[1] + 1))
        curves[:, 0] = 1.0
        np.subtract(1.0, hazards, out=curves[:, 1:])
        np.multiply.accumulate(curves, axis=1, out=curves)
        curves[:, -1] = 0.0
        return curves
