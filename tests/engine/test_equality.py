"""Token-for-token equality with stock vLLM on the live engine, and controls that it can fail.

Every AVMP engine here runs with ``verify``: all invariants at every step, and the worker's page
table compared with the scheduler's.
"""

from __future__ import annotations

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
    tokens,
)

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.core import Kind, MovePlan
from avmp_vllm.engine.worker.plans import PlanApplier
from avmp_vllm.models.shapes import read_shape
from avmp_vllm.planner.plan import make_plan

#: An arena of the tiny Jamba in which the mixed prompts preempt, migrate and relocate.
TIGHT = 1_600_000


@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("memory", [AMPLE, TIGHT], ids=["ample", "tight"])
def test_answers_equal_stock(tiny_jamba, caching, memory):
    """The mixed prompts, twice: the second round hits the cache where there is one."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        # Without room to grow, so that requests are admitted until some must be preempted.
        avmp={"checkpoint_tokens": 128, "admission": "growth", "growth_tokens": 0},
        kv_cache_memory_bytes=memory,
        enable_prefix_caching=caching,
    ) as llm:
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
        assert_nothing_held(llm)
        did = counted(llm)
        if memory == TIGHT:
            assert did.statistics.migrations[Kind.KV] > 0
            assert did.statistics.migrations[Kind.SSM] > 0
            assert sum(did.statistics.relocations.values()) > 0
            # With prefix caching a spare state is kept free, which these short answers never need;
            # the long ones below preempt.
            assert caching or did.preemptions > 0
        else:
            assert sum(did.statistics.migrations.values()) == 0
        if caching:
            assert llm.get_metrics()  # the engine kept statistics
            assert scheduler_of(llm).kv_cache_manager.arena.cached(Kind.KV) > 0
            assert scheduler_of(llm).kv_cache_manager.arena.cached(Kind.SSM) > 0


@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "cache"])
def test_chunked_prefill(tiny_jamba, caching):
    """Chunks far shorter than the prompts, and shorter than the checkpoint spacing."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=caching,
        max_num_batched_tokens=48,
    ) as llm:
        assert greedy(llm, mixed_prompts()) == expected
        assert_nothing_held(llm)


@pytest.mark.parametrize("batch", [1, 8, 10_000])
def test_migration_batch(tiny_jamba, batch):
    """Any batch gives the same tokens; a small one migrates more often."""
    expected = stock_answers(tiny_jamba)
    with engine(tiny_jamba, avmp={"migration_batch": batch}, kv_cache_memory_bytes=TIGHT) as llm:
        assert greedy(llm, mixed_prompts()) == expected
        assert sum(counted(llm).statistics.migrations.values()) > 0


def test_async_scheduling(tiny_jamba):
    """Plans are applied in order when steps are scheduled ahead of their predecessors' output."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
        async_scheduling=True,
    ) as llm:
        assert type(scheduler_of(llm)).__name__ == "AVMPAsyncScheduler"
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
        assert_nothing_held(llm)
        assert sum(counted(llm).statistics.relocations.values()) > 0


def test_several_answers_and_long_outputs(tiny_jamba):
    """``n`` answers a prompt, each crossing many pages and several checkpoints.

    Whoever is admitted or preempted: whole answers are the same.
    """
    prompts = mixed_prompts(seed=7, count=6)
    answers = {}
    growth = {
        "checkpoint_tokens": 64,
        "admission": "growth",
        "growth_tokens": 0,
        "victim": "last",
    }
    forecast = {"checkpoint_tokens": 64, "admission": "forecast", "victim": "cheapest"}
    for name, avmp, memory in (
        ("stock", None, AMPLE),
        ("growth", growth, TIGHT),
        ("forecast", forecast, TIGHT),
    ):
        with engine(
            tiny_jamba,
            avmp=avmp,
            kv_cache_memory_bytes=memory,
            enable_prefix_caching=True,
        ) as llm:
            answers[name] = greedy(llm, prompts, max_tokens=200, n=3)
            if avmp is not None:
                assert_nothing_held(llm)
                assert counted(llm).preemptions > 0
            if name == "forecast":
                assert scheduler_of(llm).kv_cache_manager.recomputed > 0
    assert answers["growth"] == answers["forecast"] == answers["stock"]
    assert all(len(each) == 3 for each in answers["forecast"])


def test_vacated_pages_are_never_read(tiny_jamba, monkeypatch):
    """Every page that a relocation leaves is filled with NaN; answers do not change."""
    expected = stock_answers(tiny_jamba)
    applied = TorchBuffer.apply

    def poisoning(self, plan):
        for move in plan.relocations:
            applied(self, MovePlan(plan.number, relocations=[move]))
            self._words[self.page(move.kind, move.source)] = -1  # all bits set is a NaN
        plan.relocations = []
        applied(self, plan)

    monkeypatch.setattr(TorchBuffer, "apply", poisoning)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
    ) as llm:
        for _ in range(2):
            assert greedy(llm, mixed_prompts()) == expected
        assert sum(counted(llm).statistics.relocations.values()) > 0


def _without(part):
    """Leave a part out of every plan that reaches the bytes."""

    def breakage(monkeypatch):
        applied = TorchBuffer.apply

        def skip(self, plan):
            setattr(plan, part, [])
            applied(self, plan)

        monkeypatch.setattr(TorchBuffer, "apply", skip)

    return breakage


def _without_table_writes(monkeypatch):
    monkeypatch.setattr(PageTable, "apply", lambda self, relocations: None)


def _plans_after_the_step(monkeypatch):
    applied = PlanApplier.apply
    held = []

    def late(self, plan):
        held.append(plan)
        if len(held) > 1:
            applied(self, held.pop(0))

    monkeypatch.setattr(PlanApplier, "apply", late)


@pytest.mark.parametrize(
    ("breakage", "memory"),
    [
        pytest.param(_without("relocations"), TIGHT, id="no-copies"),
        pytest.param(_without_table_writes, TIGHT, id="no-table-writes"),
        # Under pressure few copies of states are made, and fewer are hit.
        pytest.param(_without("copies"), AMPLE, id="no-copy-on-write"),
        pytest.param(_plans_after_the_step, TIGHT, id="late"),
    ],
)
def test_control_broken_plans_change_answers(tiny_jamba, monkeypatch, breakage, memory):
    """The equality tests would notice a plan that is not carried out."""
    expected = stock_answers(tiny_jamba)
    breakage(monkeypatch)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128, "verify": False},
        kv_cache_memory_bytes=memory,
        enable_prefix_caching=True,
    ) as llm:
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
    assert rounds != [expected] * 2


def test_chunks_may_end_anywhere(tiny_jamba):
    """Steps of 96 tokens end inside of blocks of 128, whose states are then published for nothing.

    The controls are in the fuzz and among the tests of Model Runner V2.
    """
    expected = stock_answers(tiny_jamba, seed=3, count=24)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        enable_prefix_caching=True,
        max_num_batched_tokens=96,
    ) as llm:
        rounds = [greedy(llm, mixed_prompts(seed=3, count=24)) for _ in range(3)]
    assert rounds == [expected] * 3


def test_aborted_requests_lose_nothing(tiny_jamba):
    """Requests that are aborted in mid-stream give their pages back; the others' answers stand."""
    from vllm import SamplingParams

    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
    ) as llm:
        core = llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for index, prompt in enumerate(mixed_prompts()):
            core.add_request(str(index), prompt, params)
        finished = {}
        steps = 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[int(output.request_id)] = list(output.outputs[0].token_ids)
            steps += 1
            if steps in (5, 12, 20):
                core.abort_request([str(steps % 20), str((steps * 7) % 20)])
        whole = {i: t for i, t in finished.items() if len(t) == 40}
        assert 10 < len(whole) < 20
        assert all(expected[index][0] == answer for index, answer in whole.items())
        assert_nothing_held(llm)


def test_mamba2_hybrid(tiny_granite):
    """Nothing knows a model by name: another family, Mamba-2 states, under pressure."""
    expected = stock_answers(tiny_granite)
    for caching in (False, True):
        with engine(
            tiny_granite,
            avmp={"checkpoint_tokens": 128},
            kv_cache_memory_bytes=1_500_000,
            enable_prefix_caching=caching,
        ) as llm:
            for _ in range(2):
                assert greedy(llm, mixed_prompts()) == expected
            assert_nothing_held(llm)
            assert sum(counted(llm).statistics.migrations.values()) > 0


def test_bf16_runs(tiny_jamba):
    """Half-precision weights and caches under pressure, to the end, without an error."""
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        dtype="bfloat16",
        kv_cache_memory_bytes=TIGHT // 2,
        enable_prefix_caching=True,
    ) as llm:
        answers = greedy(llm, mixed_prompts())
        assert all(len(answer) == 40 for (answer,) in answers)
        assert_nothing_held(llm)


def test_fp8_pages(tiny_jamba):
    """Keys and values in fp8 (e4m3): a quarter of the page, the same tokens as stock's in fp8."""
    answers = {}
    for name, avmp, memory in (("stock", None, AMPLE), ("avmp", {"growth_tokens": 0}, TIGHT // 2)):
        with engine(
            tiny_jamba,
            avmp=avmp,
            kv_cache_memory_bytes=memory,
            kv_cache_dtype="fp8_e4m3",
            enable_prefix_caching=avmp is not None,
        ) as llm:
            answers[name] = [greedy(llm, mixed_prompts()) for _ in range(2)]
            if avmp is not None:
                assert_nothing_held(llm)
                did = counted(llm).statistics
                assert min(did.migrations.values()) > 0
                assert sum(did.relocations.values()) > 0
                geometry = runner_of(llm).kv_cache_config.geometry
    assert answers["avmp"] == answers["stock"]
    assert answers["stock"][0] != stock_answers(tiny_jamba)  # rounding shows
    plan = make_plan(read_shape(tiny_jamba), TIGHT // 2, kv_dtype="fp8_e4m3", backend="CPU_ATTN")
    assert plan.geometry == geometry
    assert geometry.page_bytes == 32_768 // 4


def test_tensor_parallel(tiny_jamba, monkeypatch):
    """Two ranks apply the same plans to arenas of their own."""
    expected = stock_answers(tiny_jamba)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    with engine(
        tiny_jamba,
        avmp={"checkpoint_tokens": 128},
        kv_cache_memory_bytes=TIGHT // 2,
        enable_prefix_caching=True,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    ) as llm:
        assert greedy(llm, mixed_prompts()) == expected
        did = counted(llm).statistics
        assert sum(did.migrations.values()) > 0
        assert sum(did.relocations.values()) > 0


def test_smallest_arena_finishes_every_request(tiny_jamba):
    """An arena that holds one request of ``max_model_len`` serves all, one after the other."""
    import random

    from avmp_vllm.core import ArenaTooSmall

    rng = random.Random(5)
    prompts = [{"prompt_token_ids": tokens(rng, n)} for n in (440, 20, 470, 300, 31, 410)]
    with engine(tiny_jamba) as llm:
        expected = greedy(llm, prompts)
    for caching, blocks in ((False, 1), (True, 3)):
        page, block = 32_768, 116_736
        least = block + blocks * block + 16 * page
        least = -(-least // page) * page  # whole KV pages
        with (
            pytest.raises(ArenaTooSmall, match="--max-model-len to at most 480"),
            engine(
                tiny_jamba,
                avmp={},
                kv_cache_memory_bytes=least - page,
                enable_prefix_caching=caching,
            ),
        ):
            pass
        with engine(
            tiny_jamba,
            avmp={"checkpoint_tokens": 64},
            kv_cache_memory_bytes=least,
            enable_prefix_caching=caching,
        ) as llm:
            geometry = runner_of(llm).kv_cache_config.geometry
            assert (geometry.page_bytes, geometry.block_bytes) == (page, block)
            assert greedy(llm, prompts) == expected
            assert_nothing_held(llm)
