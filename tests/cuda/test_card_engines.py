"""Token-for-token equality with stock vLLM on a card, under migration, relocation and preemption.

In fp32, where another batch changes no best token. Every engine runs with ``verify``, which reads
the page table back from the device at each step.
"""

from __future__ import annotations

import functools
import os
import random
from typing import Any

import pytest
import torch
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
from vllm import SamplingParams

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.backing.kernel_buffer import KernelBuffer
from avmp_vllm.core import Kind
from avmp_vllm.models.tiny_jamba import write_tiny_jamba

ON_V1 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0"
#: Whether nobody else takes the card's memory meanwhile.
ALONE = "PYTEST_XDIST_WORKER" not in os.environ
MIB = 1 << 20
#: An arena of the tiny Jamba in which the mixed prompts preempt, migrate and relocate.
TIGHT = 1_600_000
#: Admits until somebody must be preempted. Pages as on CPUs, for whose sizes the arenas are tight.
EAGER_ADMISSION = {
    "page_tokens": 32,
    "checkpoint_tokens": 128,
    "admission": "growth",
    "growth_tokens": 0,
}
GRAPHS = {
    "eager": {},
    "graphs": {
        "enforce_eager": False,
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
        },
    },
    # As `vllm serve` does it unless told otherwise: Inductor, and graphs of prefills in pieces.
    "compiled": {
        "enforce_eager": False,
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 64, 256]},
    },
}


@functools.cache
def stock_in(model: str, graphs: str) -> list[list[list[int]]]:
    """What stock vLLM answers; Inductor's kernels round otherwise, for AVMP as for stock."""
    if graphs != "compiled":
        return stock_answers(model)
    with engine(model, **GRAPHS[graphs]) as llm:
        return greedy(llm, mixed_prompts())


def hits(llm: Any) -> float:
    """Tokens that prompts have found in the prefix cache."""
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


def assert_moved(llm: Any) -> None:
    """Capacity migrated and live pages moved."""
    did = counted(llm)
    assert sum(did.statistics.migrations.values()) > 0
    assert sum(did.statistics.relocations.values()) > 0


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("caching", [False, True], ids=["no-cache", "cache"])
@pytest.mark.parametrize("kernels", ["resolved", "handles"])
def test_answers_equal_stock(tiny_jamba, kernels, caching, graphs):
    """With vLLM's kernels and with AVMP's, in graphs and without."""
    if kernels == "handles" and ON_V1:
        pytest.skip("kernels by handle are Runner V2's")
    expected = stock_in(tiny_jamba, graphs)
    with engine(
        tiny_jamba,
        avmp={**EAGER_ADMISSION, "kernels": kernels},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=caching,
        **GRAPHS[graphs],
    ) as llm:
        name = "AVMPGPUModelRunner" if ON_V1 else "AVMPModelRunnerV2"
        assert type(runner_of(llm)).__name__ == name
        backends = {g.backend.__name__ for gs in runner_of(llm).attn_groups for g in gs}
        assert ("HandleAttentionBackend" in backends) is (kernels == "handles")
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        assert_nothing_held(llm)
        assert_moved(llm)
        assert bool(hits(llm)) is caching
    assert rounds == [expected] * 2


@pytest.mark.parametrize("graphs", GRAPHS)
def test_mamba2_hybrid(tiny_granite, graphs):
    """vLLM's own kernels for Mamba-2, which save states inside of chunks."""
    expected = stock_in(tiny_granite, graphs)
    with engine(
        tiny_granite,
        avmp=EAGER_ADMISSION,
        kv_cache_memory_bytes=1_100_000,
        enable_prefix_caching=True,
        **GRAPHS[graphs],
    ) as llm:
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        assert_nothing_held(llm)
        assert_moved(llm)
        assert hits(llm) > 0
    assert rounds == [expected] * 2


def _no_table_writes(monkeypatch):
    """Relocations are not written to the table on the device."""
    monkeypatch.setattr(DevicePageTable, "apply", lambda self, moves: None)


def _no_copies(monkeypatch):
    """Pages get a new place and leave their bytes behind."""
    applied = KernelBuffer.apply

    def apply(self, plan):
        kept, plan.relocations = plan.relocations, []
        applied(self, plan)
        plan.relocations = kept

    monkeypatch.setattr(KernelBuffer, "apply", apply)


@pytest.mark.skipif(ON_V1, reason="the seams that are broken here are Runner V2's")
@pytest.mark.parametrize("kernels", ["resolved", "handles"])
@pytest.mark.parametrize("breakage", [_no_table_writes, _no_copies])
def test_control_broken_plans_change_answers(tiny_jamba, monkeypatch, breakage, kernels):
    """The tests above would notice what is left out on the device."""
    expected = stock_answers(tiny_jamba)
    breakage(monkeypatch)
    with engine(
        tiny_jamba,
        avmp={**EAGER_ADMISSION, "kernels": kernels, "verify": False},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
    ) as llm:
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        assert_moved(llm)
    assert rounds != [expected] * 2


# -- memory that goes back -------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", GRAPHS)
@pytest.mark.parametrize("kernels", ["resolved", "handles"])
def test_elastic_memory(jamba_of_large_states, kernels, graphs):
    """Over a gap that faults; the card's free memory follows load and budget."""
    if kernels == "handles" and ON_V1:
        pytest.skip("kernels by handle are Runner V2's")
    model, size = jamba_of_large_states, 256 * MIB
    expected = stock_in(model, graphs)
    options = {"memory": "elastic", "kernels": kernels, "budget": "40MiB", "slack_bytes": "8MiB"}
    with engine(
        model,
        avmp={**EAGER_ADMISSION, **options},
        kv_cache_memory_bytes=size,
        enable_prefix_caching=True,
        **GRAPHS[graphs],
    ) as llm:

        def memory(*budget: Any) -> dict[str, Any]:
            (report,) = llm.collective_rpc("avmp_memory", args=budget)
            return report

        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        assert_moved(llm)
        assert memory()["calls"]["unmap"] > 0
        (more,) = llm.collective_rpc("avmp_memory", args=("200MiB",))
        assert more["budget"] == 200 * MIB
        rounds.append(greedy(llm, mixed_prompts()))
        full, free = memory(), torch.cuda.mem_get_info()[0]
        assert llm.reset_prefix_cache()
        rest = memory(full["least_budget"])
        assert rest["backed"] <= rest["held"] + 2 * rest["chunk_bytes"]
        assert rest["backed"] < full["backed"] // 2
        if ALONE:
            assert torch.cuda.mem_get_info()[0] - free >= full["backed"] - rest["backed"]
        assert_nothing_held(llm)
        memory("40MiB")
        rounds.append(greedy(llm, mixed_prompts()))
    assert rounds == [expected] * 4


def test_the_budget_changes_in_mid_traffic(jamba_of_large_states):
    """Lowered and raised while requests run, steps scheduled ahead."""
    expected = stock_answers(jamba_of_large_states)
    with engine(
        jamba_of_large_states,
        avmp={**EAGER_ADMISSION, "memory": "elastic", "budget": "64MiB"},
        kv_cache_memory_bytes=256 * MIB,
        enable_prefix_caching=True,
        async_scheduling=True,
    ) as llm:
        core, finished, steps = llm.llm_engine, {}, 0
        for index, prompt in enumerate(mixed_prompts()):
            params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
            core.add_request(str(index), prompt, params)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[int(output.request_id)] = [list(output.outputs[0].token_ids)]
            steps += 1
            if steps % 6 == 0:
                llm.collective_rpc("avmp_memory", args=("24MiB" if steps % 12 else "64MiB",))
        assert counted(llm).preemptions > 0
        assert_nothing_held(llm)
    assert [finished[index] for index in range(len(expected))] == expected


@pytest.mark.parametrize("memory", ["fixed", "elastic"])
def test_sleep_and_wake_up(jamba_of_large_states, memory):
    """The arena's memory goes and comes back, with the weights in vLLM's own."""
    expected = stock_answers(jamba_of_large_states)
    with engine(
        jamba_of_large_states,
        avmp={**EAGER_ADMISSION, "memory": memory},
        kv_cache_memory_bytes=128 * MIB,
        enable_prefix_caching=True,
        enable_sleep_mode=True,
    ) as llm:
        rounds = []
        for _ in range(2):
            rounds.append(greedy(llm, mixed_prompts()))
            awake = torch.cuda.mem_get_info()[0]
            llm.sleep(1)
            assert not ALONE or torch.cuda.mem_get_info()[0] - awake > 32 * MIB
            llm.wake_up()
        rounds.append(greedy(llm, mixed_prompts()))
    assert rounds == [expected] * 3


def test_cold_states(tmp_path):
    """States that are encoded and decoded between launches; a few answers may differ."""
    model = str(write_tiny_jamba(tmp_path, mamba_d_state=64))
    rng = random.Random(4)
    turns = [[tokens(rng, rng.randrange(60, 200)) for _ in range(16)]]
    for _ in range(3):
        turns.append([prompt + tokens(rng, 40) for prompt in turns[-1]])
    prompts = [[{"prompt_token_ids": prompt} for prompt in turn] for turn in turns]
    with engine(model) as llm:
        expected = [greedy(llm, turn, 8) for turn in prompts]
    with engine(
        model,
        avmp={**EAGER_ADMISSION, "cold_states": "int12"},
        kv_cache_memory_bytes=8_000_000,
        enable_prefix_caching=True,
        max_num_seqs=4,
    ) as llm:
        answers = [greedy(llm, turn, 8) for _ in range(2) for turn in prompts]
        cold = scheduler_of(llm).kv_cache_manager.cold
        assert cold.encoded > cold.decoded > 10
        assert_nothing_held(llm)
    pairs = [
        pair for a, b in zip(answers, expected * 2, strict=True) for pair in zip(a, b, strict=True)
    ]
    assert sum(one != other for one, other in pairs) <= len(pairs) // 20


# -- what people add -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["resolved", "handles"])
def test_offloading_to_the_host(tiny_jamba, kernels):
    """Prefixes come back through pinned memory on streams of their own."""
    if kernels == "handles" and ON_V1:
        pytest.skip("kernels by handle are Runner V2's")
    rng = random.Random(3)
    first = [tokens(rng, rng.randrange(100, 300)) for _ in range(16)]
    second = [prompt + tokens(rng, 20) for prompt in first]
    turns = [[{"prompt_token_ids": prompt} for prompt in turn] for turn in (first, second)]
    with engine(tiny_jamba) as llm:
        expected = [greedy(llm, turn, 8) for turn in turns]
    with engine(
        tiny_jamba,
        avmp={"kernels": kernels, "page_tokens": 32},
        kv_cache_memory_bytes=TIGHT,
        enable_prefix_caching=True,
        kv_offloading_size=0.125,
        kv_offloading_backend="native",
    ) as llm:
        answers = [greedy(llm, turn, 8) for turn in turns]
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        assert counts["vllm:external_prefix_cache_hits"] > 400
        assert_moved(llm)
    assert answers == expected


def serve_drafting(
    model: str, speculative: dict[str, Any], avmp: dict[str, Any] | None, memory: int
) -> dict[str, Any]:
    """Two rounds of prompts that share prefixes, with drafts and a prefix cache."""
    rng = random.Random(2)
    prefix, again = tokens(rng, 150), tokens(rng, 40)
    prompts = [
        {"prompt_token_ids": (prefix if i % 2 else []) + tokens(rng, 40) + again[: 8 * (i % 5)] * 2}
        for i in range(10)
    ]
    with engine(
        model,
        avmp=avmp,
        kv_cache_memory_bytes=memory,
        enable_prefix_caching=True,
        speculative_config={"num_speculative_tokens": 3, **speculative},
    ) as llm:
        answers = [greedy(llm, prompts[::way], 24, temperature=0)[::way] for way in (1, -1)]
        counts = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
        if avmp is not None:
            assert_nothing_held(llm)
            assert_moved(llm)
            assert counts["vllm:prefix_cache_hits"] > 0
        return {
            "answers": answers,
            "drafted": counts["vllm:spec_decode_num_draft_tokens"],
            "accepted": counts["vllm:spec_decode_num_accepted_tokens"],
        }


def test_drafts(tiny_granite):
    """Drafts beside a prefix cache, whose states vLLM copies by kernels of its own.

    By ngrams: the tiny model with a drafting layer has gated delta nets, which vLLM computes in
    bf16 only on CUDA, where another batch may change the best token.
    """
    speculative = {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    stock = serve_drafting(tiny_granite, speculative, None, AMPLE)
    avmp = serve_drafting(tiny_granite, speculative, EAGER_ADMISSION, 1_300_000)
    assert stock["drafted"] > 0
    assert avmp["answers"] == stock["answers"]
    assert avmp["accepted"] > 0


def test_large_bytes_are_seen(tiny_jamba):
    """An arena beyond 2**31 elements: pages at one of its ends, states at the other."""
    expected = stock_answers(tiny_jamba)
    with engine(
        tiny_jamba, avmp={}, kv_cache_memory_bytes=12 << 30, enable_prefix_caching=True
    ) as llm:
        rounds = [greedy(llm, mixed_prompts()) for _ in range(2)]
        arena = scheduler_of(llm).kv_cache_manager.arena
        assert arena.held(Kind.KV)
        assert arena.held(Kind.SSM)
        assert arena.geometry.arena_bytes // 4 > 2**31
    assert rounds == [expected] * 2
