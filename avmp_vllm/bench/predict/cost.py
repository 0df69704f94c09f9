"""What forecasting costs on this machine: medians of microseconds."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

from avmp_vllm.bench.predict.answers import Load
from avmp_vllm.predict.forecaster import LengthForecaster
from avmp_vllm.predict.reserve import RunningSet

#: Requests that are timed, and running requests at which the reserve is.
TIMED = 2000
RUNNING = (40, 256)
REPEATS = 400
RISK, PAGE, STATE_PAGES = 1.25, 16, 34.0


def costs(load: Load, longest: int) -> dict[str, float]:
    """Microseconds of an arrival, of all progress of an answer, of its end; of a reserve."""
    forecaster = LengthForecaster(longest)
    spent: dict[str, list[int]] = {"arrival": [], "progress": [], "finish": []}
    for answer in load.answers[:TIMED]:
        hashes, prompt_hashes = answer.hashes, answer.prompt_hashes
        marks = [time.perf_counter_ns()]
        forecast = forecaster.arrive(answer.prompt, prompt_hashes)
        marks.append(time.perf_counter_ns())
        while forecast.next_progress < answer.tokens:
            forecaster.progress(forecast, forecast.next_progress)
        marks.append(time.perf_counter_ns())
        forecaster.finish(forecast, answer.tokens, hashes)
        marks.append(time.perf_counter_ns())
        for name, (begin, end) in zip(spent, pairwise(marks), strict=True):
            spent[name].append(end - begin)
    found = {name: statistics.median(values) / 1e3 for name, values in spent.items()}
    found["arrival and learning"] = statistics.median(map(sum, zip(*spent.values(), strict=True)))
    found["arrival and learning"] /= 1e3
    for count in RUNNING:
        running = RunningSet(forecaster.bins, PAGE, STATE_PAGES)
        for index in range(count):
            answer = load.answers[index % len(load.answers)]
            forecast = forecaster.arrive(answer.prompt)
            generated = answer.tokens * (index % 7) // 7
            running.add(index, forecast, answer.prompt, generated)
        times = []
        for _ in range(REPEATS):
            running.advance()
            begin = time.perf_counter_ns()
            running.reserve(RISK)
            times.append(time.perf_counter_ns() - begin)
        found[f"reserve, {count} running"] = statistics.median(times) / 1e3
    return found
