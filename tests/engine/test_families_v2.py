"""Every family on Model Runner V2 under Triton's interpreter: tokens equal stock vLLM's on V1.

The scenarios run in a process of their own, see ``v2_families.py``. All but the controls run with
``verify``, in an arena in which capacity migrates, live pages move and requests are preempted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from enginelib import engine, greedy, mixed_prompts
from hybrids import COUNT, FAMILIES, NEW_TOKENS, layers_of

from avmp_vllm.engine.entry.config import SELECTED
from avmp_vllm.models.tiny_hybrids import write_tiny_eagle, write_tiny_qwen3_next_mtp

_SCRIPT = Path(__file__).with_name("v2_families.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The checkpoints, by family."""
    folder = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        family.write(folder / name)
    write_tiny_qwen3_next_mtp(folder / "mtp")
    for method in ("eagle", "eagle3"):
        write_tiny_eagle(folder / method, method, eagle_aux_hidden_state_layer_ids=[1, 2, 3])
    return folder


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Run all scenarios; return what each wrote down."""
    result = tmp_path_factory.mktemp("v2") / "result.json"
    environment = {name: value for name, value in os.environ.items() if name != SELECTED}
    environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(_SCRIPT), str(result), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ended.stdout[-20000:], ended.stderr[-10000:])
    assert ended.returncode == 0, ended.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def expected(folder) -> dict[str, list[list[list[int]]]]:
    """Stock vLLM's answers on Runner V1, without prefix cache or pressure."""
    answers = {}
    for name in FAMILIES:
        with layers_of(name), engine(str(folder / name)) as llm:
            answers[name] = greedy(llm, mixed_prompts(1, COUNT), NEW_TOKENS)
    return answers


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_equal_stock(done, expected, name):
    """Two rounds with a cache, the second in opposite order; the mixed one is scheduled ahead."""
    did = done[name]
    assert (did["scheduler"] == "AVMPAsyncScheduler") is (name == "mixed_mixed")
    assert did["runner"] == "AVMPCPUModelRunnerV2"
    assert did["tables"] == FAMILIES[name].tables
    assert did["migrations"]
    assert did["hits"]
    assert did["rounds"] == [expected[name]] * 2


@pytest.mark.parametrize("name", ["kimi_linear", "mixed_mixed"])
def test_answers_equal_stock_without_a_cache(done, expected, name):
    """Where requests hold one state each; some are preempted in one of the two modes."""
    did = done[name + " uncached"]
    assert did["preemptions"] + done[name]["preemptions"]
    assert did["rounds"] == [expected[name]]


@pytest.mark.parametrize("method", ["mtp", "eagle", "eagle3"])
def test_drafts_equal_stock(done, method):
    """Tokens and each draft, with a prefix cache, whose states vLLM copies for drafting requests.

    By the model's own layer, and by drafters beside it.
    """
    stock, avmp = done[f"{method} stock"], done[f"{method} avmp"]
    assert len(stock["drafts"]) > 100
    assert avmp["answers"] == stock["answers"]
    assert avmp["drafts"] == stock["drafts"]
    assert 0 < avmp["accepted"] == stock["accepted"] < avmp["drafted"] == stock["drafted"]
    assert avmp["hits"] > 0
    assert avmp["migrations"] > 0
    assert avmp["relocations"] > 0


@pytest.mark.parametrize(
    ("name", "control"),
    [("mixed_window", "window_not_resolved"), ("mixed_mixed", "first_layout_alone")],
)
def test_control_what_is_left_out_changes_answers(done, expected, name, control):
    """The tests above would notice a window read by handle, and a state that moved in part."""
    assert done[control]["relocations"]
    assert done[control]["rounds"] != [expected[name]] * 2


def test_kernels_by_handle_are_refused_where_pages_differ(done):
    """They read one layout of full attention; the error says what the model keeps."""
    said = done["refused"]
    for name, what in (
        ("mixed_kv", "3 layouts of pages (FullAttentionSpec) in 1 block table(s)"),
        ("mixed_window", "sliding window not supported"),
        ("kimi_linear", "MLA not supported"),
    ):
        assert what in said[name]
        assert "set kernels to 'resolved'" in said[name]


def test_kernels_reach_states_beyond_32_bits(done):
    """A block's stride is all layers' states: its product with the index needs 64 bits."""
    found = done["far_states"]
    control = found.pop("control")
    assert found
    assert all(kernel["same"] and kernel["left"] for kernel in found.values())
    assert not control["same"]
