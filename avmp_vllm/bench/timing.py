"""Timing of alternatives in one run: alternating rounds, CPU time, medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Subject(NamedTuple):
    """One alternative.

    Attributes:
        work: What is timed.
        units: How many units of work that is.
        prepare: Makes the argument of ``work`` before each round, untimed.
    """

    work: Callable[[Any], object]
    units: int
    prepare: Callable[[], Any] = lambda: None


def alternate(subjects: Mapping[str, Subject], rounds: int) -> dict[str, float]:
    """Time every subject once a round, in turn, so that a slow minute hits all of them.

    Args:
        subjects: By name.
        rounds: Timed rounds; one more goes before them.

    Returns:
        Median seconds of this thread's CPU time for a unit, by name. The garbage collector is off
        while a subject runs.
    """
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, subject in subjects.items():
            argument = subject.prepare()
            gc.collect()
            gc.disable()
            try:
                start = time.thread_time()
                subject.work(argument)
                elapsed = time.thread_time() - start
            finally:
                gc.enable()
            if number:
                seconds[name].append(elapsed / subject.units)
    return {name: statistics.median(values) for name, values in seconds.items()}
