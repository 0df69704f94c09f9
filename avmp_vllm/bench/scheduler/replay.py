"""Play a trace through a scheduler: real scheduling, made-up tokens, a stated clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from avmp_vllm.bench.scheduler.engines import Engine
from avmp_vllm.bench.scheduler.traces import TraceRequest

#: Samples of the bytes are taken every so many steps.
SAMPLE_STEPS = 100
#: Ends every answer; no made-up token is below 10.
STOP = 2


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


@dataclass
class _Step:
    """A scheduled step whose output the scheduler has not seen.

    Attributes:
        output: The scheduler's.
        requests: Those that it computes, in its order.
        tokens: What each samples: one token, or none.
        ends: When its output is there; None of a step without tokens.
        seen: Outputs that the scheduler had seen when it scheduled this.
    """

    output: SchedulerOutput
    requests: list[Request]
    tokens: list[list[int]]
    ends: float | None
    seen: int


class _Replay:
    """State of one run."""

    def __init__(
        self, engine: Engine, requests: list[TraceRequest], step_time: StepTime, ahead: bool
    ) -> None:
        self.engine = engine
        self.trace = requests
        self.step_time = step_time
        self.depth = 2 if ahead else 1
        self.outcome = Outcome()
        self.clock = 0.0
        self.device_free = 0.0
        self.seen = 0
        self.flight: deque[_Step] = deque()
        self.pending = deque(enumerate(requests))
        self.answers: dict[str, list[int]] = {}
        self.reached: dict[str, int] = {}
        self.first_token: dict[str, float] = {}
        self.finish: dict[str, float] = {}
        self.in_scheduler = 0.0

    def admit(self) -> None:
        """Hand over the requests that have arrived."""
        if not (self.flight or self.engine.scheduler.has_unfinished_requests()):
            self.clock = max(self.clock, self.pending[0][1].arrival)
        while self.pending and self.pending[0][1].arrival <= self.clock:
            index, request = self.pending.popleft()
            name = str(index)
            self.answers[name] = [*request.output.token_ids()[:-1], STOP]
            self.engine.answers[name] = len(self.answers[name])
            prompt = [token for segment in request.prompt for token in segment.token_ids()]
            # As vLLM sets it where a user sets nothing. The answer's length would tell the
            # scheduler when a request ends, which no scheduler knows.
            limit = self.engine.scheduler.max_model_len - len(prompt)
            params = SamplingParams(max_tokens=limit, ignore_eos=True, stop_token_ids=[STOP])
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

    def advance(self) -> None:
        """What the engine core does in a turn: schedule, then wait if nothing else can be done."""
        scheduler = self.engine.scheduler
        if scheduler.has_requests():
            self._schedule()
            if len(self.flight) < self.depth and (
                self.flight[-1].ends is not None or scheduler.has_requests()
            ):
                return
        self._take_output()

    def _schedule(self) -> None:
        scheduler, outcome = self.engine.scheduler, self.outcome
        begin = time.thread_time()
        output = scheduler.schedule()
        self.in_scheduler += time.thread_time() - begin
        scheduled = output.num_scheduled_tokens
        requests = [scheduler.requests[name] for name in scheduled]
        tokens = [
            self._sampled(request, count)
            for request, count in zip(requests, scheduled.values(), strict=True)
        ]
        step = _Step(output, requests, tokens, None, self.seen)
        self.flight.append(step)
        if not scheduled:
            return
        took = self.step_time.seconds(output.total_num_scheduled_tokens, len(scheduled))
        self.device_free = step.ends = max(self.device_free, self.clock) + took
        running = len(scheduler.running)
        outcome.steps += 1
        outcome.concurrency_mean += running * took
        outcome.concurrency_peak = max(outcome.concurrency_peak, running)
        if outcome.steps % SAMPLE_STEPS == 1:
            self._sample_bytes(step.ends)

    def _sampled(self, request: Request, count: int) -> list[int]:
        """Account for a request's part of a step; the token that it samples, if any."""
        name, end = request.request_id, request.num_computed_tokens
        start, reached = end - count, self.reached.get(request.request_id)
        if reached is None:
            self.outcome.hit_tokens += start
            reached = start
        self.outcome.recomputed_tokens += max(0, min(end, reached) - start)
        self.reached[name] = max(end, reached)
        if request.is_prefill_chunk:
            return []
        # Scheduled ahead, this step's own placeholder is counted already.
        ahead = max(0, request.num_output_placeholders - 1)
        # Nor does the scheduler know that the answer has ended in a step that still runs; what is
        # computed behind the end is thrown away.
        answer = self.answers[name]
        return [answer[min(request.num_output_tokens + ahead, len(answer) - 1)]]

    def _take_output(self) -> None:
        """Give the scheduler the output of the oldest step that it has not seen."""
        scheduler, outcome = self.engine.scheduler, self.outcome
        step = self.flight.popleft()
        if step.ends is None:
            self._take_nothing(step)
            return
        self.clock = step.ends
        names = list(step.output.num_scheduled_tokens)
        result = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, step.tokens)
        had = [request.num_output_tokens for request in step.requests]
        begin = time.thread_time()
        scheduler.update_from_output(step.output, result)
        self.in_scheduler += time.thread_time() - begin
        self.seen += 1
        for name, request, before in zip(names, step.requests, had, strict=True):
            if request.num_output_tokens == before:
                continue
            self.first_token.setdefault(name, self.clock)
            outcome.output_tokens += request.num_output_tokens - before
            if name not in scheduler.requests:
                assert list(request.output_token_ids) == self.answers[name], name
                assert request.status == RequestStatus.FINISHED_STOPPED, name
                self.finish[name] = self.clock
                outcome.finished += 1
                outcome.preemptions += request.num_preemptions

    def _take_nothing(self, step: _Step) -> None:
        """A step without tokens: time stands still, unless only an arrival can change anything."""
        scheduler = self.engine.scheduler
        scheduler.update_from_output(step.output, ModelRunnerOutput([], {}))
        if self.seen > step.seen or not scheduler.has_unfinished_requests():
            return
        if not self.pending:
            raise Stuck(
                f"{len(scheduler.waiting)} requests wait at {self.clock:.1f} s and none is "
                "scheduled"
            )
        self.clock = max(self.clock, self.pending[0][1].arrival)

    def _sample_bytes(self, now: float) -> None:
        engine = self.engine
        live = engine.live_bytes()
        wasted = engine.referenced_bytes() - live
        self.outcome.bytes_over_time.append([now, live, wasted, engine.evictable_bytes()])

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
    ahead: bool = False,
) -> Outcome:
    """Run a trace to its end.

    Args:
        engine: A fresh scheduler.
        requests: In order of arrival.
        step_time: The clock.
        progress: Called with the number of requests that finished in a step.
        ahead: Schedule as the engine core does with asynchronous scheduling: a step is scheduled
            when the one before it starts, before its output is there; steps follow one another
            without a gap, and a request that arrives during a step waits for the next but one.
            Otherwise each step is scheduled behind the output of the one before it. In neither does
            scheduling itself take time.

    Raises:
        Stuck: No request is scheduled and none will arrive.
    """
    run = _Replay(engine, requests, step_time, ahead)
    while run.pending or run.flight or engine.scheduler.has_unfinished_requests():
        run.admit()
        before = run.outcome.finished
        run.advance()
        if run.outcome.finished > before:
            progress(run.outcome.finished - before)
    return run.summary()
