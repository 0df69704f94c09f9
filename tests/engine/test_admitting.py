"""Admission by forecast and the choice of victims, in vLLM's scheduler without a model."""

from __future__ import annotations

import random
from typing import Any

import pytest
from test_manager import Driver, arena_for, prompt
from vllm.v1.request import Request, RequestStatus

from avmp_vllm import predict
from avmp_vllm.core import Kind
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler, AVMPScheduler

FORECAST = {"admission": "forecast", "victim": "cheapest"}
SCHEDULERS = [
    pytest.param(AVMPScheduler, 0, id="sync"),
    pytest.param(AVMPAsyncScheduler, 1, id="async"),
]
#: Ends an answer.
STOP = 99


class Answers(Driver):
    """Answers end by a stop token, so that their lengths are nobody's to know."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: dict[str, int] = {}

    def ask(self, name: str, text: list[int], answer: int, most: int = 600) -> Request:
        """Queue a request whose answer ends by itself after so many tokens."""
        self.lengths[name] = answer
        request = self.add(name, text, most)
        request.sampling_params.stop_token_ids = [STOP]
        return request

    def sampled(self, request: Request) -> int:
        ahead = max(request.num_output_placeholders - 1, 0)
        left = self.lengths[request.request_id] - request.num_output_tokens - ahead
        return 1 if left > 1 else STOP

    def check_reckoning(self) -> None:
        """Who runs is who is reckoned with, and holds what is said."""
        admission, manager = self.manager.admission, self.manager
        running = {request.request_id for request in self.scheduler.running}
        assert {request.request_id for request in admission._requests()} == running
        known = {request.request_id for request in admission._forecasts}
        assert running <= known <= set(self.scheduler.requests)
        if not manager.enable_caching and not self._ahead:
            # As at the next decision: each running request has a page for its latest token.
            admission.look()
            geometry = self.arena.geometry
            states = self.arena.used(Kind.SSM) * geometry.block_bytes / geometry.page_bytes
            held = admission._running.held() - states
            assert abs(held - self.arena.used(Kind.KV)) <= len(running)


def load(driver: Answers, seed: int, count: int, watch: Any = None) -> None:
    """Requests of all sizes; some are cut off, some are given up."""
    rng = random.Random(seed)
    for index in range(count):
        name = f"{index}"
        most = rng.choice((600, 600, 20))
        driver.ask(name, prompt(index, rng.randrange(5, 300)), rng.randrange(1, 200), most)
        for _ in range(rng.randrange(12)):
            driver.step()
            if watch is not None:
                watch()
        if rng.random() < 0.1:
            driver.scheduler.finish_requests(f"{rng.randrange(index + 1)}", ABORTED)
    while driver.scheduler.has_unfinished_requests():
        driver.step()
        if watch is not None:
            watch()


ABORTED = RequestStatus.FINISHED_ABORTED


@pytest.mark.parametrize(("scheduler", "ahead"), SCHEDULERS)
@pytest.mark.parametrize("caching", [False, True])
def test_what_runs_is_reckoned_with(
    model: str,
    caching: bool,
    scheduler: type,
    ahead: int,
) -> None:
    """At every step, under pressure; nothing is left at the end, and all that ended was learned."""
    memory = arena_for(2.5)
    driver = Answers(model, memory, caching, scheduler, options=FORECAST, ahead=ahead)
    load(driver, 3, 50, driver.check_reckoning)
    driver.run(limit=100)
    admission = driver.manager.admission
    assert len(admission._running) == 0
    assert admission._forecasts == {}
    assert driver.manager.victims._started == {}
    ended = sum(driver.lengths[name] <= 20 for name in driver.finished)
    assert admission.score.answers >= ended > 0
    assert admission.refusals > 0
    assert 0 <= admission.score.within[0] <= admission.score.within[1] <= admission.score.answers
    driver.check_empty()


def test_control_a_request_that_is_not_taken_out_is_noticed(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    driver = Answers(model, arena_for(2.5), options=FORECAST)
    monkeypatch.setattr(type(driver.manager.admission), "left", lambda self, request: None)
    with pytest.raises((AssertionError, ValueError)):
        load(driver, 3, 50, driver.check_reckoning)


def test_it_learns_how_much_room_is_needed(model: str) -> None:
    """Short answers ask for little room, long ones for much; a limit for no more than itself."""
    rooms = {}
    for answers in (10, 400):
        driver = Answers(model, arena_for(30), options=FORECAST)
        for index in range(60):
            driver.ask(f"{index}", prompt(index, 40), answers)
            driver.step()
        driver.run(limit=2_000)
        for name in ("a", "b"):
            driver.ask(name, prompt(name, 40), answers)
        driver.step()
        newcomer = driver.ask("c", prompt("c", 40), answers)
        rooms[answers] = driver.manager.admission.room(newcomer)
        for name in ("a", "b"):  # as if their users had said so
            request = driver.scheduler.requests[name]
            request.max_tokens = 2
            driver.manager.admission._running.remove(request)
            driver.manager.admission._forecasts[request].cap(2)
            driver.manager.admission.admitted(request, 0, 40)
        assert driver.manager.admission.room(newcomer) <= 2
    assert rooms[10] < 4 < rooms[400]


def test_a_refusal_is_not_reckoned_again(model: str) -> None:
    """Until pages come free, or for 16 steps."""
    driver = Answers(model, arena_for(1.2), options=FORECAST)
    driver.ask("a", prompt("a", 300), 400)
    driver.ask("b", prompt("b", 300), 400)
    driver.step()
    driver.step()
    driver.ask("c", prompt("c", 300), 10)
    admission = driver.manager.admission
    rule = admission._rule
    driver.step()
    assert [r.request_id for r in driver.scheduler.waiting] == ["c"]
    reckoned = rule.reckoned
    for _ in range(12):
        driver.step()
    assert rule.reckoned == reckoned
    assert admission.refusals == 13
    driver.scheduler.finish_requests("b", ABORTED)
    driver.step()
    assert rule.reckoned == reckoned + 1
    assert len(driver.scheduler.waiting) == 0


def test_a_conversation_is_known_by_its_last_answer(model: str) -> None:
    driver = Answers(model, arena_for(4), options=FORECAST)
    first = driver.ask("a", prompt("a", 70), 77)
    driver.run(limit=200)
    turn = driver.ask("b", [*first.all_token_ids, *prompt("b", 20)], 5)
    driver.step()
    known = driver.manager.admission._forecasts[turn].known
    assert (known.turn, known.previous) == (1, 77)


def test_the_clocks_of_clients_decide_nothing(model: str) -> None:
    """The same requests with other times of arrival: the same steps, preemptions included."""
    runs = []
    for offset in (0.0, -1e9):
        driver = Answers(model, arena_for(2), options={**FORECAST, "forecast_risk": 0.0})
        rng, steps = random.Random(7), []
        asked = []
        for index in range(40):
            text = prompt(index, rng.randrange(5, 200))
            asked.append(driver.ask(f"{index}", text, rng.randrange(1, 300)))
            asked[-1].arrival_time = offset * index
            steps.append(driver.step().num_scheduled_tokens)
        while driver.scheduler.has_unfinished_requests():
            steps.append(driver.step().num_scheduled_tokens)
        assert sum(request.num_preemptions for request in asked) > 0
        assert driver.manager.recomputed > 0
        runs.append(steps)
    assert runs[0] == runs[1]


# -- victims ---------------------------------------------------------------------------------------

CHEAPEST = {"admission": "growth", "growth_tokens": 0, "victim": "cheapest"}


def crowd(driver: Answers, steps: int) -> dict[str, tuple[int, int]]:
    """Requests that never stop arriving in a small arena; steps each took, and its preemptions.

    The first is cheap to compute again for long: its prompt is short and its answer long.
    """
    rng = random.Random(11)
    asked: dict[str, Request] = {}
    begun: dict[str, int] = {}
    took: dict[str, tuple[int, int]] = {}
    for step in range(steps):
        while len(driver.scheduler.waiting) < 4:
            name = f"{len(asked)}"
            first = not asked
            size = (1, 500) if first else (rng.randrange(60, 250), rng.randrange(60, 200))
            asked[name] = driver.ask(name, prompt(name, size[0]), size[1], 700)
        driver.step()
        for request in driver.scheduler.running:
            begun.setdefault(request.request_id, step)
        for name in driver.finished:
            took.setdefault(name, (step - begun[name], asked[name].num_preemptions))
    running = driver.scheduler.running
    for request in [*running, *driver.scheduler.waiting]:
        if request.request_id in begun:
            since = step - begun[request.request_id]
            took.setdefault(request.request_id, (since, request.num_preemptions))
    return took


def test_nobody_starves(model: str) -> None:
    """Preempted again and again, everybody ends, and the first in its turn."""
    driver = Answers(model, arena_for(1.4), caching=False, options=CHEAPEST)
    took = crowd(driver, 3_000)
    assert sum(preemptions for _, preemptions in took.values()) > 30
    assert took["0"] == (499, 0)  # the oldest is never preempted
    assert max(steps for steps, _ in took.values()) < 1_500


def test_control_without_protection_the_oldest_gives_way(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unprotected(candidates: Any) -> list[predict.Candidate]:
        return sorted(candidates, key=lambda each: (-each.cost, each.arrival))

    monkeypatch.setattr(predict, "order", unprotected)
    driver = Answers(model, arena_for(1.4), caching=False, options=CHEAPEST)
    steps, preemptions = crowd(driver, 3_000)["0"]
    assert preemptions > 2
    assert steps > 500


@pytest.mark.parametrize("caching", [False, True])
def test_the_cheapest_is_preempted(model: str, caching: bool) -> None:
    """Of three that run, the one in the middle of the queue is the cheapest."""
    for victim, expected in (("last", "c"), ("cheapest", "b")):
        options = {"admission": "growth", "growth_tokens": 0, "victim": victim}
        driver = Answers(model, arena_for(1.25), caching, options=options)
        for name, tokens in (("a", 300), ("b", 20), ("c", 310)):
            driver.ask(name, prompt(name, tokens), 500, 700)
        requests = dict(driver.scheduler.requests)
        while not any(request.num_preemptions for request in requests.values()):
            driver.step()
        preempted = [name for name, request in requests.items() if request.num_preemptions]
        assert preempted == [expected], victim
        driver.run(limit=3_000)
        driver.check_empty()


def test_with_room_the_order_is_vllms(model: str) -> None:
    driver = Answers(model, arena_for(60), options=CHEAPEST)
    for index in range(8):
        driver.ask(f"{index}", prompt(index, 10 + 37 * index % 100), 50)
    for _ in range(20):
        driver.step()
    assert [request.request_id for request in driver.scheduler.running] == list("01234567")
