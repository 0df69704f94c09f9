"""Token-for-token equality with stock vLLM while the gap of the arena has no memory.

A page that is read or written without memory ends the process by a fault, so every test here also
shows that nothing was missed. Every engine runs with ``verify``.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from enginelib import (
    AMPLE,
    assert_nothing_held,
    counted,
    engine,
    greedy,
    mixed_prompts,
    runner_of,
    scheduler_of,
    stock_answers,
)
from vllm import SamplingParams
from vllm.v1.worker.cpu_worker import CPUWorker

from avmp_vllm.backing.torch_buffer import bytes_behind
from avmp_vllm.core import Kind
from avmp_vllm.core.extents import backed_bytes
from avmp_vllm.engine.scheduler.memory import ArenaMemory
from avmp_vllm.engine.worker.elastic import ArenaRange

#: A budget of the tiny Jamba in which the mixed prompts preempt, migrate and relocate.
TIGHT = 1_600_000
CHUNK = 64 << 10
HERE = Path(__file__).parent
#: As in the tests of a fixed arena, with a gap of at least 6 MB that never has memory.
OPTIONS = {
    "memory": "elastic",
    "virtual_bytes": "8MB",
    "chunk_bytes": CHUNK,
    "slack_bytes": 6 * CHUNK,
    "checkpoint_tokens": 128,
    "growth_tokens": 0,
}


def memory_of(llm) -> dict:
    """What the engine says of its memory."""
    (report,) = llm.collective_rpc("avmp_memory")
    return report


@pytest.fixture
def bounded(monkeypatch):
    """Checks at every step that what exists is what is held, the slack and two chunks at most."""
    began, made, checked = ArenaMemory.begin_step, ArenaRange.__init__, []
    workers = []

    def init(self, *args):
        made(self, *args)
        workers[:] = [self]

    def begin_step(self, idle):
        over = self.arena.over_bytes
        began(self, idle)
        slack = 0 if idle else self.elastic.slack_bytes
        assert self.exists <= self.held_bytes + slack + 2 * CHUNK or self.arena.over_bytes
        # What was over the budget until now goes with the plan of this step.
        assert over or all(worker.report().exists <= self.exists for worker in workers)
        checked.append(self.exists)

    monkeypatch.setattr(ArenaMemory, "begin_step", begin_step)
    monkeypatch.setattr(ArenaRange, "__init__", init)
    yield checked
    assert len(checked) > 50
    assert min(checked) < max(checked) / 2, "memory did not follow"


def assert_at_rest(llm) -> None:
    """With the cache dropped: the null bytes and at most two chunks, mapped and existing."""
    assert_nothing_held(llm)
    assert llm.reset_prefix_cache()
    report = memory_of(llm)
    geometry = scheduler_of(llm).kv_cache_manager.geometry
    assert report["held"] == geometry.null_bytes
    assert report["backed"] <= geometry.null_bytes + 2 * CHUNK
    assert report["mapped"] <= report["backed"]
    assert report["given_back"] > 0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "cache"])
def test_answers_equal_stock(tiny_jamba, caching, asynchronous, bounded):
    """Under pressure: migrations, relocations and preemptions over a gap that faults."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp=OPTIONS | {"budget": TIGHT},
        kv_cache_memory_bytes=AMPLE,
        enable_prefix_caching=caching,
        async_scheduling=asynchronous,
    ) as llm:
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
        did = counted(llm)
        assert sum(did.statistics.migrations.values()) > 0
        assert sum(did.statistics.relocations.values()) > 0
        assert caching or did.preemptions > 0
        assert memory_of(llm)["calls"]["unmap"] > 0
        assert_at_rest(llm)


def test_the_default_budget_is_what_a_fixed_arena_has(tiny_jamba, bounded):
    """All of the bytes, in huge pages where the host has them; several answers a prompt."""
    prompts = mixed_prompts(seed=7, count=6)
    with engine(tiny_jamba, enable_prefix_caching=True) as llm:
        expected = greedy(llm, prompts, max_tokens=100, n=3)
    options = {"memory": "elastic", "chunk_bytes": CHUNK, "checkpoint_tokens": 64}
    with engine(
        tiny_jamba, avmp=options, kv_cache_memory_bytes=AMPLE, enable_prefix_caching=True
    ) as llm:
        assert memory_of(llm)["budget"] == AMPLE
        assert scheduler_of(llm).kv_cache_manager.arena.reserve_bytes > AMPLE // 2
        assert greedy(llm, prompts, max_tokens=100, n=3) == expected
        assert_at_rest(llm)


def test_the_budget_changes_in_mid_traffic(tiny_jamba, bounded):
    """Lowered to the least while requests run, and raised again; the answers are stock's."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp=OPTIONS | {"budget": "4MB"},
        kv_cache_memory_bytes=AMPLE,
        enable_prefix_caching=True,
        async_scheduling=True,
    ) as llm:
        core, manager = llm.llm_engine, scheduler_of(llm).kv_cache_manager
        assert greedy(llm, mixed_prompts()) == expected  # now the cache holds something
        least = memory_of(llm)["least_budget"]
        finished, given, overs, steps = {}, 0, 0, 0
        for index, prompt in enumerate(mixed_prompts()):
            params = SamplingParams(top_k=1, max_tokens=40, ignore_eos=True)
            core.add_request(str(index), prompt, params)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[int(output.request_id)] = [list(output.outputs[0].token_ids)]
            steps += 1
            if steps % 12 == 6:
                cached = sum(manager.arena.cached(kind) for kind in Kind)
                (report,) = llm.collective_rpc("avmp_memory", args=(least,))
                assert report["budget"] == least
                given += report["given_back_now"]
                # Cached pages have gone before anything of a running request had to.
                after = sum(manager.arena.cached(kind) for kind in Kind)
                assert not report["over"] or not after or after < cached
                overs += report["over"] > 0
            elif steps % 12 == 0:
                (report,) = llm.collective_rpc("avmp_memory", args=("3MB",))
                assert report["budget"] == 3_000_000 // CHUNK * CHUNK
            if not manager.arena.over_bytes:
                geometry = manager.geometry
                backed = backed_bytes(manager.arena.extents, geometry.high_end, CHUNK)
                assert backed <= manager.memory.budget
        assert given > 0
        assert overs > 0
        assert counted(llm).preemptions > 0
        assert [finished[index] for index in range(len(expected))] == expected
        assert_at_rest(llm)


def test_refused_budgets(tiny_jamba):
    """By a message with numbers, raised or returned."""
    with engine(tiny_jamba, avmp=OPTIONS | {"budget": TIGHT}, kv_cache_memory_bytes=AMPLE) as llm:
        for budget, message in (
            ("1k", "budget = 0: one request of max_model_len needs"),
            ("1GiB", "addresses for 80"),
            ("much", "budget = 'much': write bytes"),
        ):
            with pytest.raises(ValueError, match=message):
                llm.collective_rpc("avmp_memory", args=(budget,))
            (report,) = llm.collective_rpc("avmp_memory", args=(budget, "return"))
            assert message.split("'")[0] in report["error"]


def test_mamba2_hybrid(tiny_granite, bounded):
    """Another family, under pressure."""
    expected = stock_answers(tiny_granite)
    with engine(
        tiny_granite,
        avmp=OPTIONS | {"budget": "1.5MB"},
        kv_cache_memory_bytes=AMPLE,
        enable_prefix_caching=True,
    ) as llm:
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
        assert_at_rest(llm)


def test_tensor_parallel(tiny_jamba, monkeypatch):
    """Two ranks, of which one gets less memory than was planned: the budget is what both have.

    Steps are scheduled ahead, so that memory is asked for while one runs.
    """
    expected = stock_answers(tiny_jamba)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(
        tiny_jamba,
        avmp=OPTIONS | {"budget": "1MB", "chunk_bytes": CHUNK // 2},
        kv_cache_memory_bytes=AMPLE,
        enable_prefix_caching=True,
        async_scheduling=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:
        llm.collective_rpc(_limit_rank_1)
        assert greedy(llm, mixed_prompts()) == expected
        memory = scheduler_of(llm).kv_cache_manager.memory
        assert memory.budget == LIMIT
        assert {worker.exists for worker in memory.workers} == {memory.exists}
        assert sum(counted(llm).statistics.relocations.values()) > 0


LIMIT = 28 * (CHUNK // 2)


def _limit_rank_1(worker) -> None:
    """Let one rank's system have less memory."""
    if worker.rank == 1:
        worker.model_runner.arena_memory._memory._limit = LIMIT


@pytest.mark.parametrize(("memory", "level"), [("fixed", 1), ("elastic", 1), ("elastic", 2)])
def test_sleep_and_wake_up(tiny_jamba, monkeypatch, memory, level):
    """What the engine core does to a sleeping worker, on memory of the host.

    vLLM's CPU worker keeps its own memory, so what its CUDA worker drops of a fixed arena is
    spoilt here.
    """
    expected = stock_answers(tiny_jamba)
    slept = CPUWorker.sleep

    def sleep(self, level=1):
        slept(self, level)
        if memory == "fixed":
            bytes_behind(self.model_runner.kv_caches[0]).fill_(0xFF)  # NaNs

    monkeypatch.setattr(CPUWorker, "sleep", sleep)
    options = OPTIONS | {"budget": TIGHT} if memory == "elastic" else {"checkpoint_tokens": 128}
    size = AMPLE if memory == "elastic" else TIGHT
    with engine(
        tiny_jamba, avmp=options, kv_cache_memory_bytes=size, enable_prefix_caching=True
    ) as llm:
        if memory == "fixed":
            assert memory_of(llm)["backed"] == size
            with pytest.raises(ValueError, match="start with memory: elastic"):
                llm.collective_rpc("avmp_memory", args=("1MB",))
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
            llm.sleep(level)
            arena = scheduler_of(llm).kv_cache_manager.arena
            assert not any(arena.used(kind) + arena.cached(kind) for kind in Kind)
            if memory == "elastic":
                report = runner_of(llm).arena_memory.report()
                assert (report.exists, report.mapped) == (0, 0)
            llm.wake_up(tags=["weights"])
            llm.wake_up(tags=["kv_cache"])
        assert greedy(llm, mixed_prompts()) == expected
        assert sum(counted(llm).statistics.relocations.values()) > 0


def test_control_an_engine_without_memory_dies(tiny_jamba):
    """By a fault, at the first page that a request writes."""
    done = subprocess.run(
        [sys.executable, str(HERE / "elastic_child.py"), tiny_jamba],
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "started"
