"""Native offloading to the host, over an arena whose pages move while they are copied.

Stock vLLM's workers copy on GPUs alone, so both sides run with the host of ``late_host.py``, but
where AVMP's own is meant.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import late_host
import pytest
from enginelib import (
    Prompt,
    assert_nothing_held,
    counted,
    engine,
    greedy,
    scheduler_of,
    tokens,
)
from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig
from vllm.v1.request import RequestStatus

from avmp_vllm.core import Kind
from avmp_vllm.core.transfers import Transfers
from avmp_vllm.engine.scheduler.scheduler import AVMPScheduler

HOST = 64 << 20
#: An arena of the tiny Jamba, and of the tiny Granite, in which the chats below move pages.
TIGHT = 1_600_000


def chats(count: int = 10, rounds: int = 2) -> list[list[Prompt]]:
    """Rounds of prompts: each goes on from its own of the round before, beside the others."""
    rng = random.Random(3)
    shared = tokens(rng, 130)
    histories = [shared + tokens(rng, rng.randrange(20, 150)) for _ in range(count)]
    found = []
    for _ in range(rounds):
        found.append([{"prompt_token_ids": list(history)} for history in histories])
        histories = [history + tokens(rng, rng.randrange(10, 60)) for history in histories]
    return found


def talk(llm: LLM, max_tokens: int = 8, count: int = 10) -> list[list[list[list[int]]]]:
    return [greedy(llm, prompts, max_tokens) for prompts in chats(count)]


def offloading(model: str, avmp: dict[str, Any] | None = None, **options: Any) -> Any:
    """An engine with a host; with AVMP in a tight arena."""
    options.setdefault("kv_transfer_config", late_host.config(HOST, delay=2))
    if avmp is not None:
        options.setdefault("kv_cache_memory_bytes", TIGHT)
    return engine(model, avmp=avmp, enable_prefix_caching=True, **options)


@functools.cache
def stock(model: str, max_tokens: int = 8, count: int = 10) -> list[list[list[list[int]]]]:
    """What stock vLLM answers with the same option."""
    with offloading(model) as llm:
        answers = talk(llm, max_tokens, count)
        assert late_host.WORKERS[-1].stored > 0
        return answers


def from_host(llm: LLM) -> int:
    """Tokens that prompts have found on the host."""
    return int(
        sum(m.value for m in llm.get_metrics() if m.name == "vllm:external_prefix_cache_hits")
    )


def assert_pages_moved(llm: LLM) -> None:
    statistics = counted(llm).statistics
    assert statistics.migrations[Kind.KV] > 0
    assert statistics.migrations[Kind.SSM] > 0
    assert sum(statistics.relocations.values()) > 0


def assert_no_transfer(llm: LLM) -> None:
    """The engine has gone on until all transfers had ended, and nothing holds a page any more."""
    scheduler = scheduler_of(llm)
    while scheduler.has_requests():
        llm.llm_engine.step()
    assert_nothing_held(llm)
    connector = scheduler.connector
    assert not connector.scheduler._jobs
    connector.fence.transfers.end_all_but(connector.scheduler._jobs)
    assert len(connector.fence.transfers) == 0
    assert not connector.fence.transfers.problems()


@pytest.mark.parametrize(("model", "ahead"), [("tiny_jamba", False), ("tiny_granite", True)])
def test_answers_equal_stock(request, model, ahead):
    """Prefixes come back from the host, while pages move and plans wait for what is copied."""
    model = request.getfixturevalue(model)
    with offloading(model, avmp={}, async_scheduling=ahead) as llm:
        answers = talk(llm)
        assert from_host(llm) > 400
        assert scheduler_of(llm).kv_cache_manager.arena.waits > 0
        assert_pages_moved(llm)
        assert_no_transfer(llm)
    assert answers == stock(model)


def test_control_without_the_fence_answers_differ(tiny_jamba, monkeypatch):
    """Plans then move and reuse pages that are being copied."""
    monkeypatch.setattr(Transfers, "holding", lambda self, places: set())
    with offloading(tiny_jamba, avmp={}, kv_transfer_config=late_host.config(HOST, delay=6)) as llm:
        answers = talk(llm)
    assert answers != stock(tiny_jamba)


def test_preempted_requests_come_back_from_the_host(tiny_jamba):
    """With the pages of their prompts, and of their answers where those are stored."""
    options = late_host.config(HOST, delay=2, offload_prompt_only=False)
    with offloading(tiny_jamba, avmp={"growth_tokens": 0}, kv_transfer_config=options) as llm:
        answers = talk(llm, max_tokens=130, count=8)
        assert counted(llm).preemptions > 0
        assert from_host(llm) > 400
        assert_no_transfer(llm)
    assert answers == stock(tiny_jamba, max_tokens=130, count=8)


def test_aborted_loads_lose_nothing(tiny_jamba):
    """Requests are aborted while their pages are loaded: those go when the load has ended."""
    first, second = chats()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    options = late_host.config(HOST, delay=6)
    with offloading(tiny_jamba, avmp={}, kv_transfer_config=options) as llm:
        greedy(llm, first, 8)
        core, scheduler = llm.llm_engine, scheduler_of(llm)
        for index, prompt in enumerate(second):
            core.add_request(str(index), prompt, params)
        answers, aborted = {}, []
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    answers[int(output.request_id)] = list(output.outputs[0].token_ids)
            loading = [
                request
                for request in scheduler.requests.values()
                if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            ]
            if loading and len(aborted) < 3:
                aborted.append(loading[0].request_id.split("-")[0])
                core.abort_request(aborted[-1:])
        assert len(aborted) == 3
        assert_no_transfer(llm)
    expected = stock(tiny_jamba)[1]
    whole = {index: answer for index, answer in answers.items() if len(answer) == 8}
    assert len(whole) == len(second) - 3
    assert all([answer] == expected[index] for index, answer in whole.items())


@pytest.mark.parametrize("policy", ["recompute", "fail"])
def test_loads_that_fail(tiny_jamba, policy):
    """Their requests compute what did not come, or end with an error; nobody else notices."""
    first, second = chats()
    options = {**late_host.config(HOST, delay=2), "kv_load_failure_policy": policy}
    with offloading(tiny_jamba, avmp={}, kv_transfer_config=options) as llm:
        answers = [greedy(llm, first, 8)]
        worker = late_host.WORKERS[-1]
        worker.fail_loads = 3
        params = SamplingParams(top_k=1, max_tokens=8, ignore_eos=True)
        outputs = llm.generate(second, params, use_tqdm=False)
        assert worker.fail_loads == 0
        assert_no_transfer(llm)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert reasons.count("error") == (3 if policy == "fail" else 0)
    for output, expected in zip(outputs, stock(tiny_jamba)[1], strict=True):
        answer = output.outputs[0]
        assert answer.finish_reason == "error" or [list(answer.token_ids)] == expected
    assert answers == stock(tiny_jamba)[:1]


def test_stores_that_fail_are_not_on_the_host(tiny_jamba):
    """Nobody loads what never came there."""
    with offloading(tiny_jamba, avmp={}) as llm:
        worker = late_host.WORKERS[-1]
        worker.fail_stores = 1 << 30
        answers = talk(llm)
        assert worker.fail_stores < 1 << 30
        assert from_host(llm) == 0
        assert_no_transfer(llm)
    assert answers == stock(tiny_jamba)


@pytest.mark.parametrize("avmp", [None, {}], ids=["stock", "avmp"])
def test_a_worker_that_dies_ends_the_engine(tiny_jamba, avmp, monkeypatch):
    """As under stock: its error reaches whoever waits for answers."""

    def dies(self, *args):
        raise RuntimeError("the host is gone")

    with offloading(tiny_jamba, avmp=avmp) as llm:
        monkeypatch.setattr(late_host.LateWorker, "_copy", dies)
        with pytest.raises(RuntimeError, match="the host is gone"):
            talk(llm)


def ask(llm: LLM, prompt: list[int]) -> tuple[list[int], int, int]:
    """An answer, the tokens of the prompt that were found, and how many of those on the host."""
    before = from_host(llm)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    scheduler = scheduler_of(llm)
    while scheduler.has_requests():
        llm.llm_engine.step()
    found = output.num_cached_tokens or 0
    return list(output.outputs[0].token_ids), found, from_host(llm) - before


_RNG = random.Random(4)
#: A prompt whose last whole page ends at 192, three that go on from there, and one of 300 tokens.
SHARED = tokens(_RNG, 200)
OTHERS = [SHARED + tokens(_RNG, 30) for _ in range(3)]
LONG = SHARED + tokens(_RNG, 100)


@functools.cache
def plain(model: str) -> list[list[int]]:
    """What stock vLLM answers to the three, and to the long one and a token."""
    with engine(model) as llm:
        return [ask(llm, prompt)[0] for prompt in (*OTHERS, [*LONG, 7])]


@pytest.mark.parametrize("misplaced", [0, 32], ids=["placed", "control"])
def test_a_state_from_the_host_is_published_at_its_own_position(tiny_jamba, monkeypatch, misplaced):
    """And then is hit there. The control: one that stands elsewhere is not published at all."""
    if misplaced:
        arrived = AVMPScheduler._update_waiting_for_remote_kv

        def elsewhere(self, request):
            states = self.kv_cache_manager.coordinator.single_type_managers[1]
            block = states.req_to_blocks[request.request_id][-1].block_id
            states.block_pool.positions[block] -= misplaced
            arrived(self, request)
            states.block_pool.positions[block] += misplaced

        monkeypatch.setattr(AVMPScheduler, "_update_waiting_for_remote_kv", elsewhere)
    with offloading(tiny_jamba, avmp={}, kv_cache_memory_bytes=8 << 20) as llm:
        ask(llm, SHARED)
        assert llm.reset_prefix_cache()
        said = [ask(llm, prompt) for prompt in OTHERS]
        assert_no_transfer(llm)
    assert [answer for answer, _, _ in said] == plain(tiny_jamba)[:3]
    again = 192 if misplaced else 0
    assert [(found, loaded) for _, found, loaded in said] == [
        (192, 192),
        (192, again),
        (192, again),
    ]


def test_a_local_hit_is_gone_on_with_from_the_host(tiny_jamba):
    """What is in the arena is shared; only what lies behind it is loaded."""
    with offloading(tiny_jamba, avmp={}, kv_cache_memory_bytes=8 << 20) as llm:
        ask(llm, LONG)
        assert llm.reset_prefix_cache()
        ask(llm, SHARED[:170])
        arena = scheduler_of(llm).kv_cache_manager.arena
        taken, take = [], arena.allocate
        arena.allocate = lambda *count: taken.append(count) or take(*count)
        answer, found, loaded = ask(llm, [*LONG, 7])
        assert (found, loaded) == (288, 288 - 160)
        assert sum(pages for pages, *_ in taken) == 10 - 5  # pages 1 to 5 are shared
        assert_no_transfer(llm)
    assert answer == plain(tiny_jamba)[3]


def test_avmps_own_host(tiny_jamba):
    """``--kv-offloading-size``: pages and states share the host's rows, and go for each other."""
    host_bytes = 5 << 19
    with offloading(
        tiny_jamba,
        avmp={},
        kv_transfer_config=None,
        kv_offloading_size=host_bytes / (1 << 30),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    ) as llm:
        events = set()
        scheduler_of(llm).kv_event_publisher.publish = lambda batch: events.update(
            (type(event).__name__, event.medium, event.group_idx) for event in batch.events
        )
        first, second = chats()
        # Backwards the second time: what came to the host last is asked for before it goes.
        answers = [greedy(llm, first, 8), greedy(llm, second[::-1], 8)[::-1]]
        cache = scheduler_of(llm).connector.scheduler.manager.cache
        assert not cache.problems()
        assert cache.used_rows > cache.rows * 3 // 4
        assert from_host(llm) > 0
        assert_pages_moved(llm)
        assert_no_transfer(llm)
        assert cache.reading_rows == cache.writing_rows == 0
        # Both pools, here and on the host, tell what comes and goes.
        assert {
            (what, where, group)
            for what in ("BlockStored", "BlockRemoved")
            for where in ("CPU", "GPU")
            for group in (0, 1)
        } <= events
        names = {metric.name for metric in llm.get_metrics()}
        assert {"vllm:kv_offload_load_bytes", "vllm:avmp_pages_used"} <= names
        assert llm.reset_prefix_cache(reset_connector=True)
        assert len(cache) == 0
    assert answers == stock(tiny_jamba)
