"""Admission by somebody who knows how long each answer will be: a bound for every forecast."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from avmp_vllm import predict
from avmp_vllm.engine.scheduler.admission import ForecastAdmission
from avmp_vllm.predict.features import Known
from avmp_vllm.predict.score import Score

if TYPE_CHECKING:
    from vllm.v1.request import Request

#: Bins from a length to its double: what is known is known to 3%.
PER_OCTAVE = 32


class Untaught:
    """In the place of a forecaster, which has nothing to learn here.

    Args:
        longest: Longest answer in tokens.
    """

    def __init__(self, longest: int) -> None:
        self.bins = predict.LengthBins(longest, PER_OCTAVE)
        self.score = Score()

    def progress(self, *args: Any) -> None:
        """Nothing to learn."""

    finish = stop = progress


class OracleAdmission(ForecastAdmission):
    """Reckons with the true lengths.

    Args:
        answers: Tokens of each request's answer, by request.
        longest: Longest answer in tokens.
        arguments: Of ``ForecastAdmission``.
    """

    def __init__(self, answers: Mapping[str, int], longest: int, *arguments: Any) -> None:
        super().__init__(Untaught(longest), *arguments)  # type: ignore[arg-type]
        self._answers = answers

    def _forecast(self, request: Request) -> predict.Forecast:
        bins = self._forecaster.bins
        curve = np.where(bins.edges < self._answers[request.request_id], 1.0, 0.0)
        return predict.Forecast.of(bins, Known(request.num_prompt_tokens), curve)
