"""Model Runner V2 under Triton's interpreter: tokens equal stock vLLM's on Runner V1.

The scenarios run in a process of their own, see ``v2_process.py``; each test here reads what one of
them wrote down. All but the controls run with ``verify``, which also reads the page table back from
the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import late_host
import pytest
from enginelib import branching_prompts, engine, greedy, stock_answers

from avmp_vllm.engine.entry.config import SELECTED
from avmp_vllm.models.tiny_hybrids import write_tiny_granite_hybrid
from avmp_vllm.models.tiny_jamba import write_tiny_jamba

_SCRIPT = Path(__file__).with_name("v2_process.py")


@pytest.fixture(scope="module")
def short_jamba(tmp_path_factory) -> str:
    """A Jamba of four layers: interpreted, a layer costs the same however wide it is."""
    return str(
        write_tiny_jamba(
            tmp_path_factory.mktemp("short"),
            num_hidden_layers=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_key_value_heads=1,
        )
    )


@pytest.fixture(scope="module")
def short_granite(tmp_path_factory) -> str:
    """A Mamba-2 hybrid of three layers with few heads."""
    return str(
        write_tiny_granite_hybrid(
            tmp_path_factory.mktemp("short_granite"),
            num_hidden_layers=3,
            layer_types=["mamba", "attention", "mamba"],
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=1,
            mamba_n_heads=1,
            mamba_d_head=128,
        )
    )


@pytest.fixture(scope="module")
def wide_jamba(tmp_path_factory) -> str:
    """A Jamba with a head size that AVMP's kernels do not take."""
    return str(
        write_tiny_jamba(
            tmp_path_factory.mktemp("wide"),
            num_hidden_layers=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            hidden_size=512,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


@pytest.fixture(scope="module")
def models(tiny_jamba, tiny_granite, short_jamba, short_granite, wide_jamba) -> list[str]:
    """In the order in which the process takes them."""
    return [tiny_jamba, tiny_granite, short_jamba, short_granite, wide_jamba]


@pytest.fixture(scope="module")
def done(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Run all scenarios; return what each wrote down."""
    result = tmp_path_factory.mktemp("v2") / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != SELECTED}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(_SCRIPT), str(result), ",".join(models)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout[-20000:], ended.stderr[-10000:])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def expected(
    tiny_jamba, tiny_granite, short_jamba, short_granite
) -> dict[str, list[list[list[int]]]]:
    """Stock vLLM's answers to the scenarios' workloads (seed, prompts, new tokens)."""
    return {
        "no_cache": stock_answers(tiny_jamba, 3, 12, 24),
        "cache": stock_answers(tiny_jamba, 1, 8, 12),
        "granite": stock_answers(tiny_granite, 1, 8, 12),
        "handles": stock_answers(short_jamba, 1, 5, 12),
        "handles_granite": stock_answers(short_granite, 1, 5, 12),
        "cuda_mamba1": stock_answers(short_jamba, 1, 5, 12),
        "cuda_mamba2": stock_answers(short_granite, 1, 5, 12),
        "unchecked": stock_answers(short_jamba, 1, 3, 6),
    }


@pytest.mark.parametrize("name", ["no_cache", "cache", "granite"])
def test_answers_equal_stock(done, expected, name):
    """Without prefix cache, with it in two rounds, and on a Mamba-2 hybrid; under pressure."""
    did = done[name]
    assert did["runner"] == "AVMPCPUModelRunnerV2"
    assert did["migrations"] > 0
    assert did["relocations"] > 0
    # With prefix caching a spare state is kept free, which so few short answers never need.
    assert name != "no_cache" or did["preemptions"] > 0
    assert did["rounds"] == [expected[name]] * (1 if name == "no_cache" else 2)


def test_async_scheduling(done, expected):
    """Steps are scheduled ahead of their predecessors' output."""
    did = done["async"]
    assert did["scheduler"] == "AVMPAsyncScheduler"
    assert did["relocations"] > 0
    assert did["rounds"] == [expected["cache"]] * 2


def test_vacated_pages_are_never_read(done, expected):
    """Every page that a relocation leaves is filled with NaN; answers do not change."""
    did = done["poisoned"]
    assert did["relocations"] > 0
    assert did["rounds"] == [expected["cache"]]


def test_dummy_runs_touch_null_pages_only(done, expected):
    """Warm-up and dummy runs before and between real steps; graphs would find their buffers."""
    did = done["dummy_runs"]
    assert did["warmed"]
    assert did["dummies"] > 10
    assert did["untouched"]
    assert did["same_addresses"]
    assert did["rounds"] == [expected["cache"]] * 2


def test_cache_for_graph_profiling(done, expected):
    """It is as small as it can be, gets no plans, is let go, and leaves no trace."""
    did = done["graph_profiling"]
    assert did["sequences"] == 4  # the largest batch of which a graph is captured
    assert did["sized"] == did["pages"]
    assert did["planless"]
    assert did["released"]
    assert did["rounds"] == [expected["cache"]]


@pytest.mark.parametrize("name", ["handles", "handles_granite"])
def test_kernels_by_handle(done, expected, name):
    """``kernels: handles`` under pressure: AVMP's attention and its Mamba-1 kernels.

    With prefix cache and asynchronous scheduling, while capacity migrates, live pages relocate and
    requests are preempted.
    """
    did = done[name]
    assert did["page_tokens"] == 16
    assert "HandleAttentionBackend" in did["backends"]
    # Mamba-2 keeps vLLM's kernels, over resolved indices.
    assert did["ssm_handles"] is (name == "handles")
    assert did["scheduler"] == "AVMPAsyncScheduler"
    assert did["migrations"] > 0
    assert did["relocations"] > 0
    # Prompts that are not cut leave no room for one here: they end before others grow.
    assert name == "handles" or did["preemptions"] > 0
    assert did["hits"] > 0
    assert (did["saved"] > 0) is (name == "handles")
    assert did["rounds"] == [expected[name]] * 2


@pytest.mark.parametrize("name", ["elastic", "elastic_resolved"])
def test_elastic_arena(done, expected, name):
    """Its gap has no memory and faults, for AVMP's kernels and for vLLM's."""
    did = done[name]
    assert did["runner"] == "AVMPCPUModelRunnerV2"
    assert ("HandleAttentionBackend" in did["backends"]) is (name == "elastic")
    assert did["relocations"] > 0
    assert did["memory"]["calls"]["unmap"] > 0
    assert did["memory"]["backed"] <= did["memory"]["held"] + 2 * did["memory"]["chunk_bytes"]
    assert did["rounds"] == [expected["handles"]] * 2


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("cuda_mamba1", []),
        (
            "cuda_mamba2",
            [
                "_chunk_scan_fwd_kernel",
                "_state_passing_fwd_kernel",
                "_store_prefill_checkpoint_kernel",
            ],
        ),
    ],
)
def test_the_kernels_that_vllm_runs_on_cuda(done, expected, name, kernels):
    """vLLM's Triton kernels for Mamba over the arena's strided views and resolved indices.

    Mamba-2's layers also save states in the middle of a prefill, which CPUs cannot. Mamba-1's scan
    over a prefill is C++ for CUDA, so AVMP's scan for CPUs takes its place.
    """
    did = done[name]
    update = ["_causal_conv1d_fwd_kernel", "_causal_conv1d_update_kernel"]
    assert {*update, "_selective_scan_update_kernel", *kernels} <= set(did["launched"])
    assert did["migrations"] > 0
    assert did["relocations"] > 0
    assert did["hits"] > 0
    assert did["rounds"] == [expected[name]] * 2


@pytest.fixture(scope="module")
def answers_to_branching(short_granite) -> list[list[list[int]]]:
    """Stock vLLM's answers without a prefix cache."""
    with engine(short_granite) as llm:
        return greedy(llm, branching_prompts(), 6)


@pytest.mark.parametrize("retention", ["", "_dense", "_interval"])
def test_states_saved_inside_of_a_chunk_are_read_at_their_position(
    done, answers_to_branching, retention
):
    """Prompts resume inside of a block, and run past its end in one chunk."""
    did = done["branching" + retention]
    assert did["hits"] >= 2 * 160
    assert did["answers"] == answers_to_branching


def test_mamba1_by_handle_saves_states_without_a_cut(done, short_jamba):
    """Every prompt is one chunk, and its states are saved on the way; one token off is seen."""
    with engine(short_jamba) as llm:
        expected = greedy(llm, branching_prompts(), 6)
    did = done["branching_handles"]
    assert did["chunks"] == len(branching_prompts())
    assert did["saved"] >= len(branching_prompts())
    assert did["hits"] >= 2 * 160
    assert did["answers"] == expected
    broken = done["branching_handles_broken"]
    assert broken["hits"] == did["hits"]
    assert broken["answers"] != expected


@pytest.mark.parametrize("retention", ["_dense", "_interval"])
def test_control_a_state_published_for_the_end_of_its_block_changes_answers(
    done, answers_to_branching, retention
):
    """The test above would notice a block that is published although its state is behind."""
    broken = done["branching" + retention + "_broken"]
    assert broken["hits"] > done["branching" + retention]["hits"]
    assert broken["answers"] != answers_to_branching


def test_drafts_equal_stock(done):
    """Tokens, and every draft: a wrong state behind a rejected token would change only the next."""
    stock, avmp = done["drafts_stock"], done["drafts"]
    assert sum(max(draft) >= 0 for draft in stock["drafts"].values()) > 100
    assert avmp["answers"] == stock["answers"]
    assert avmp["drafts"] == stock["drafts"]
    assert 0 < avmp["accepted"] < avmp["drafted"] == stock["drafted"]
    assert avmp["accepted"] == stock["accepted"]
    assert avmp["hits"] > 0
    assert avmp["migrations"] > 0
    assert avmp["relocations"] > 0


@pytest.mark.parametrize("name", ["no_table_writes", "no_copies", "no_rows"])
def test_control_broken_plans_change_answers(done, expected, name):
    """The tests above would notice what is left out on the device."""
    assert done[name]["relocations"] > 0
    assert done[name]["rounds"] != [expected["cache"]]


def test_control_stale_page_table_changes_answers_by_handle(done, expected):
    """And so they would where kernels resolve handles by themselves."""
    did = done["handles_no_table_writes"]
    assert did["relocations"] > 0
    assert did["ssm_handles"]
    assert did["rounds"] != [expected["handles"]]


def test_debug_mode_names_the_first_bad_handle(done):
    """With ``verify``: handles and page-table entries of both pools, before the forward pass."""
    said = done["corrupted"]["said"]
    why = {
        "of the other pool": "is not a handle of the {} pool",
        "beyond the table": "the page table has",
        "negative": "is not a handle of the {} pool",
        "unmapped": "it is not mapped",
        "outside of the arena": "it maps to 1048576, outside of the arena",
    }
    assert len(said) == 2 * len(why)
    for case, text in said.items():
        pool, what = case.split(" ", 1)
        assert text.startswith("bad handle"), f"{case}: {text}"
        assert why[what].format(pool.upper()) in text, case
    assert "bad handle 0x5" in done["corrupted"]["ended"]
    assert done["corrupted"]["ran"] == 0


@pytest.mark.parametrize("name", ["unchecked", "unchecked_handles"])
def test_release_mode_sends_bad_handles_to_null(done, expected, name):
    """Without ``verify``: only the request whose handles are bad gets another answer."""
    did, stock = done[name], expected["unchecked"]
    assert did["checks"] is False
    assert did["damaged"] > 1
    assert did["pools_seen"] == 2
    assert not did["null_given"]
    (answers,) = did["rounds"]
    assert answers[1:] == stock[1:]
    assert answers[0] != stock[0]


def test_unsupported_shapes_are_refused_at_start(done):
    """Each error names the value and the setting that works."""
    said = done["refusals"]
    assert said.pop("all as it was") == "taken"
    for name, value in (
        ("head size", "head_size = 512"),
        ("page size", "page_tokens = 48"),
        ("KV dtype", "kv_cache_dtype = fp8_e5m2"),
        ("dtype", "dtype torch.float64"),
        ("pages at the last check", "page_tokens 24"),
        ("state dtype", "torch.float8_e4m3fn"),
        ("convolution", "over 1 input"),
    ):
        assert value in said[name]
        assert "set kernels to 'resolved'" in said.pop(name)
    assert not said


def test_prefixes_come_back_from_the_host(tiny_jamba, done):
    """What the arena has given up is loaded, while pages move."""
    with engine(tiny_jamba) as llm:
        expected = [greedy(llm, prompts, 4) for prompts in late_host.turns()]
    result = done["offloading"]
    assert result["runner"] == "AVMPCPUModelRunnerV2"
    assert result["answers"] == expected
    assert result["host"] > 0
    assert result["relocations"] > 0
