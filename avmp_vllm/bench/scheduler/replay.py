"""Play a trace through a scheduler: real scheduling, made-up tokens, a stated clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from avmp_vllm.bench.scheduler.engines import Engine
from avmp_vllm.bench.scheduler.traces import TraceRequest

#: Samples of the bytes are taken every so many steps.
SAMPLE_STEPS = 100


class Stuck(RuntimeError):
    """The scheduler schedules nothing although requests wait and none will arrive."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, the same for all variants.

    Attributes:
        fixed: Milliseconds of every step.
        token: Microseconds of every scheduled token.
        sequence: Microseconds of every scheduled sequence.
    """

    fixed: float
    token: float
    sequence: float

    def seconds(self, tokens: int, sequences: int) -> float:
        """Duration of a step."""
        return self.fixed / 1e3 + (self.token * tokens + self.sequence * sequences) / 1e6


@dataclass
class Outcome:
    """What a run came to; simulated time, so deterministic apart from the last field.

    Attributes:
        finished: Requests that finished.
        output_tokens: Tokens that they got.
        makespan: Seconds from the first arrival to the last token.
        steps: Steps that were run.
        concurrency_mean: Running requests, averaged over time.
        concurrency_peak: Most running requests of a step.
        preemptions: Times that a running request lost everything.
        recomputed_tokens: Tokens computed at positions that had been computed before.
        hit_tokens: Prompt tokens skipped when a request was first scheduled.
        ttft: Seconds from arrival to the first token, p50, p90, p99.
        latency: Seconds from arrival to the last token, p50, p90, p99.
        bytes_over_time: Rows of seconds, live, wasted and evictable bytes.
        scheduler_us: Microseconds a step in the scheduler (processor time, this machine).
    """

    finished: int = 0
    output_tokens: int = 0
    makespan: float = 0.0
    steps: int = 0
    concurrency_mean: float = 0.0
    concurrency_peak: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0
    hit_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    bytes_over_time: list[list[float]] = field(default_factory=list)
    scheduler_us: float = 0.0

    @property
    def request_rate(self) -> float:
        """Finished requests a second."""
        return self.finished / self.makespan

    def counts(self) -> dict[str, Any]:
        """Everything deterministic, as plain data."""
        values = asdict(self) | {"requests_per_second": self.request_rate}
        del values["scheduler_us"]
        return values


def _percentiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, (50, 90, 99))]


class _Replay:
    """State of one run."""

    def __init__(self, engine: Engine, requests: list[TraceRequest], step_time: StepTime) -> None:
        self.engine = engine
        self.trace = requests
        self.step_time = step_time
        self.outcome = Outcome()
        self.clock = 0.0
        self.pending = deque(enumerate(requests))
        self.answers: dict[str, list[int]] = {}
        self.reached: dict[str, int] = {}
        self.first_token: dict[str, float] = {}
        self.finish: dict[str, float] = {}
        self.preempted: dict[str, int] = {}
        self.in_scheduler = 0.0

    def admit(self) -> None:
        """Hand over the requests that have arrived."""
        while self.pending and self.pending[0][1].arrival <= self.clock:
            index, request = self.pending.popleft()
            name = str(index)
            self.answers[name] = request.output.token_ids()
            prompt = [token for segment in request.prompt for token in segment.token_ids()]
            params = SamplingParams(max_tokens=request.output.tokens, ignore_eos=True)
            self.engine.scheduler.add_request(
                Request(
                    request_id=name,
                    prompt_token_ids=prompt,
                    sampling_params=params,
                    pooling_params=None,
                    arrival_time=request.arrival,
                    block_hasher=self.engine.hasher,
                )
            )

    def step(self) -> None:
        """Run one step of the scheduler."""
        scheduler, outcome = self.engine.scheduler, self.outcome
        begin = time.thread_time()
        output = scheduler.schedule()
        self.in_scheduler += time.thread_time() - begin
        scheduled = output.num_scheduled_tokens
        if not scheduled:
            if not self.pending:
                raise Stuck(
                    f"{len(scheduler.waiting)} requests wait at {self.clock:.1f} s and none is "
                    "scheduled"
                )
            scheduler.update_from_output(output, ModelRunnerOutput([], {}))
            self.clock = max(self.clock, self.pending[0][1].arrival)
            return
        took = self.step_time.seconds(output.total_num_scheduled_tokens, len(scheduled))
        self.clock += took
        outcome.steps += 1
        outcome.concurrency_mean += len(scheduler.running) * took
        outcome.concurrency_peak = max(outcome.concurrency_peak, len(scheduler.running))
        samples = [self._advance(name, count) for name, count in scheduled.items()]
        if outcome.steps % SAMPLE_STEPS == 1:
            self._sample_bytes()
        names = list(scheduled)
        result = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, samples)
        begin = time.thread_time()
        scheduler.update_from_output(output, result)
        self.in_scheduler += time.thread_time() - begin
        for name in names:
            if name not in scheduler.requests:
                self.finish[name] = self.clock
                outcome.finished += 1
                outcome.preemptions += self.preempted[name]

    def _advance(self, name: str, count: int) -> list[int]:
        """Account for a request's part of a step; the token that it samples, if any."""
        request = self.engine.scheduler.requests[name]
        end = request.num_computed_tokens
        start = end - count
        if name not in self.reached:
            self.outcome.hit_tokens += start
            self.reached[name] = start
        self.outcome.recomputed_tokens += max(0, min(end, self.reached[name]) - start)
        self.reached[name] = max(end, self.reached[name])
        self.preempted[name] = request.num_preemptions
        if end < request.num_tokens:
            return []
        self.first_token.setdefault(name, self.clock)
        self.outcome.output_tokens += 1
        return [self.answers[name][request.num_output_tokens]]

    def _sample_bytes(self) -> None:
        engine = self.engine
        live = engine.live_bytes()
        wasted = engine.referenced_bytes() - live
        self.outcome.bytes_over_time.append([self.clock, live, wasted, engine.evictable_bytes()])

    def summary(self) -> Outcome:
        """Totals of a finished run."""
        outcome, trace = self.outcome, self.trace
        outcome.makespan = self.clock
        outcome.concurrency_mean /= self.clock
        outcome.scheduler_us = self.in_scheduler / outcome.steps * 1e6
        outcome.ttft = _percentiles(
            [t - trace[int(n)].arrival for n, t in self.first_token.items()]
        )
        outcome.latency = _percentiles([t - trace[int(n)].arrival for n, t in self.finish.items()])
        return outcome


def replay(
    engine: Engine,
    requests: list[TraceRequest],
    step_time: StepTime,
    progress: Callable[[int], None] = lambda finished: None,
) -> Outcome:
    """Run a trace to its end.

    Args:
        engine: A fresh scheduler.
        requests: In order of arrival.
        step_time: The clock.
        progress: Called with the number of requests that finished in a step.

    Raises:
        Stuck: No request is scheduled and none will arrive.
    """
    run = _Replay(engine, requests, step_time)
    while run.pending or engine.scheduler.has_unfinished_requests():
        if not engine.scheduler.has_unfinished_requests():
            run.clock = max(run.clock, run.pending[0][1].arrival)
        run.admit()
        before = run.outcome.finished
        run.step()
        if run.outcome.finished > before:
            progress(run.outcome.finished - before)
    return run.summary()
