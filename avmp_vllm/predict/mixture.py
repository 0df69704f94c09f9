"""Weights of models that forecast side by side, by how well each did lately."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avmp_vllm.predict.bins import Floats, LengthBins

#: Share of the past loss that is kept from one answer to the next.
KEEP = 0.99
#: A model loses no more on one answer than if it had given it this probability.
LEAST = 1e-6


class Mixture:
    """A weighted mean of models, the weights from their decayed log-loss.

    The loss is that of the octave an answer ends in. Finer bins would judge a model of few answers
    by its noise, and weigh it down although it knows more.

    Args:
        bins: Of the lengths.
        models: How many.

    Attributes:
        weights: Of the models, ``[models]``; their sum is 1.
        octaves: Edges at which octaves begin, as indices; the last is the end of all bins.
    """

    def __init__(self, bins: LengthBins, models: int) -> None:
        self._bins = bins
        self._loss: Floats = np.zeros(models)
        self.weights: Floats = np.full(models, 1.0 / models)
        edges = [0.0]
        while (2.0 ** (len(edges) - 1)) < bins.longest:
            edges.append(2.0 ** (len(edges) - 1))
        self.octaves: NDArray[np.intp] = np.append(
            np.searchsorted(bins.edges, edges), bins.count
        ).astype(np.intp)

    def mean(self, curves: Floats) -> Floats:
        """The mixture's curve, from the models' ``[models, edges]``."""
        mixed: Floats = self.weights @ curves
        return mixed

    def judge(self, reached: Floats, length: int, ended: bool) -> Floats:
        """Judge the models by an answer.

        Args:
            reached: Each model's curve at the octaves' edges, ``[models, octaves + 1]``.
            length: Of the answer.
            ended: By itself; else all that is known is that it would have gone on.

        Returns:
            Probability that each model gave to what came, ``[models]``.
        """
        if ended:
            octave = int(np.searchsorted(self.octaves, self._bins.bin(length), side="right")) - 1
            probability = reached[:, octave] - reached[:, octave + 1]
        else:
            passed, _ = self._bins.passed(length)
            octave = int(np.searchsorted(self.octaves, passed, side="right")) - 1
            probability = reached[:, min(octave, len(self.octaves) - 2)]
        probability = np.maximum(probability, LEAST)
        self._loss *= KEEP
        self._loss -= np.log(probability)
        weights = np.exp(self._loss.min() - self._loss)
        self.weights = weights / weights.sum()
        return probability
