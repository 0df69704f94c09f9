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

import pytest
from enginelib import engine, greedy, short_prompts, stock_answers

from avmp_vllm.engine.config import SELECTED

_SCRIPT = Path(__file__).with_name("v2_process.py")


@pytest.fixture(scope="module")
def done(tiny_jamba, tiny_granite, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Run all scenarios; return what each wrote down."""
    result = tmp_path_factory.mktemp("v2") / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != SELECTED}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(_SCRIPT), str(result), tiny_jamba, tiny_granite],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout[-20000:], ended.stderr[-10000:])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def expected(tiny_jamba, tiny_granite) -> dict[str, list[list[list[int]]]]:
    """Stock vLLM's answers to the scenarios' workloads (seed, prompts, new tokens)."""
    short = {}
    for name, model in (("handles", tiny_jamba), ("handles_granite", tiny_granite)):
        with engine(model) as llm:
            short[name] = greedy(llm, short_prompts(), 5)
    return {
        **short,
        "no_cache": stock_answers(tiny_jamba, 3, 12, 24),
        "cache": stock_answers(tiny_jamba, 1, 8, 12),
        "granite": stock_answers(tiny_granite, 1, 8, 12),
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
    """``kernels: handles``: AVMP's attention on its 16-token pages, and its Mamba-1 kernels."""
    did = done[name]
    assert did["page_tokens"] == 16
    assert "HandleAttentionBackend" in did["backends"]
    # Mamba-2 keeps vLLM's kernels, over resolved indices.
    assert did["ssm_handles"] is (name == "handles")
    assert did["rounds"] == [expected[name]]


@pytest.mark.parametrize("name", ["no_table_writes", "no_copies", "no_rows"])
def test_control_broken_plans_change_answers(done, expected, name):
    """The tests above would notice what is left out on the device."""
    assert done[name]["relocations"] > 0
    assert done[name]["rounds"] != [expected["cache"]]
