"""Forecasts of answer lengths, and what is decided with them; standard library and numpy only.

============= =========================================================================
bins          bins of lengths, and curves over them: P(length > edge)
hazards       rows of events and exposure, with forgetting: the survival model
features      prompt length, previous answer and turn as ladders of rows
conversations which conversation a prompt goes on with, by the hashes of its prefix
mixture       weights of the rows' forecasts by their past log-loss
score         how good the forecasts were that came true
forecaster    ``LengthForecaster``: the six above behind four calls
reserve       ``RunningSet``: pages that running requests may still need
admission     ``Admission``: whether a waiting request may start
victims       ``order``: running requests by what preempting them would cost
buckets       ``AdaptiveBuckets``: sizes of contiguous reservations
============= =========================================================================

Nothing here knows a clock, random numbers, text or vLLM: the same calls give the same answers, bit
for bit. An engine makes these calls (``F`` a ``LengthForecaster``, ``R`` a ``RunningSet``, ``A`` an
``Admission`` over ``R``; a request keeps the ``Forecast`` that ``F.arrive`` gave):

arrival
    ``forecast = F.arrive(prompt tokens, hashes of the prompt's full blocks)``, once a request.
it waits, and is next
    ``A.stands(name)`` if an earlier refusal stands; else ``A.reserve()``, the pages that must stay
    free, and ``A.refused(name)`` if they would not. Not for requests that run.
it starts, or goes on after a preemption
    ``R.add(name, forecast, prompt tokens, generated, computed, shared pages)``.
a chunk of its prompt was scheduled
    ``R.computed(name, tokens)``.
first token, and each step
    ``R.advance()`` where every request got one token, ``R.advance(names)`` where some did,
    ``R.generated(name, tokens)`` where several came at once; or, before the next ``A.reserve``,
    ``R.generated_by`` for all. ``A.step()`` once a step. Where a request has reached
    ``forecast.next_progress`` tokens: ``F.progress(forecast, generated)``.
it ended by itself
    ``F.finish(forecast, generated, hashes)``, ``R.remove(name)``, ``A.freed()``.
it was cut off at a limit, or given up
    ``F.stop(forecast, generated, hashes)``, ``R.remove(name)`` if it ran, ``A.freed()``.
it was preempted
    ``R.remove(name)``, ``A.freed()``; its forecast stays with it.
before a step in which somebody may be preempted
    ``order(candidates)``: vLLM preempts the last of its running requests.
"""

from avmp_vllm.predict.admission import Admission
from avmp_vllm.predict.bins import LengthBins
from avmp_vllm.predict.buckets import AdaptiveBuckets, Placement
from avmp_vllm.predict.forecaster import Forecast, LengthForecaster
from avmp_vllm.predict.reserve import RunningSet
from avmp_vllm.predict.victims import Candidate, order, victim

__all__ = [
    "AdaptiveBuckets",
    "Admission",
    "Candidate",
    "Forecast",
    "LengthBins",
    "LengthForecaster",
    "Placement",
    "RunningSet",
    "order",
    "victim",
]
