"""The pages say what the code does: every metric, option, message, seam, refusal and command."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import pytest
import vllm.config

from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.entry.config import AVMPConfig
from avmp_vllm.engine.entry.options import REFUSALS
from avmp_vllm.engine.scheduler import metrics

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
#: What a user of the engine may read; the rest of the code is commands, with errors of one line.
SPEAKING = ("core", "backing", "engine")
#: Never meant for a user: called with arguments that only a programmer can give.
PROGRAMMING_ERRORS = {
    ("backing/elastic_buffer.py", "BackingError"),
    ("backing/memory.py", "AlreadyMapped"),
    ("backing/memory.py", "HalfMapping"),
    ("backing/memory.py", "Misaligned"),
    ("backing/memory.py", "NoAliases"),
    ("backing/memory.py", "NotMapped"),
    ("backing/memory.py", "NotReserved"),
    ("backing/memory.py", "StillMapped"),
    ("backing/memory.py", "UnknownHandle"),
    ("core/arena.py", "ValueError"),
    ("core/geometry.py", "ValueError"),
    ("engine/scheduler/block_pool.py", "NotImplementedError"),
    ("engine/cpu/scan.py", "ValueError"),
    ("engine/handles/attention.py", "NotImplementedError"),
    ("engine/worker/v2/block_tables.py", "NotImplementedError"),
    ("engine/worker/v2/runner.py", "NotImplementedError"),
}


def page(name: str) -> str:
    """A page's text with its white space made single blanks."""
    return " ".join((DOCS / name).read_text().split())


def rows(name: str) -> list[list[str]]:
    """The cells of all table rows of a page."""
    lines = (DOCS / name).read_text().splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("| ")
    ]


# -- for operators ---------------------------------------------------------------------------------


def exported() -> dict[str, str]:
    """Names of AVMP's metrics as Prometheus has them, and their labels."""
    return {f"vllm:avmp_{metric.name}": metric.label for metric in metrics.GAUGES} | {
        f"vllm:avmp_{metric.name}_total": metric.label for metric in metrics.COUNTERS
    }


def test_every_metric_is_explained_and_no_other():
    """Each in a row of its own, with the label it really has."""
    explained = {
        cells[0].strip("`"): cells[1]
        for cells in rows("operators.md")
        if cells[0].startswith("`vllm:")
    }
    assert {name: label.strip("`") for name, label in explained.items()} == exported()
    for label, series in metrics.SERIES.items():
        for value in filter(None, series):
            assert f"`{value}`" in page("operators.md"), f"{label} {value}"


def test_every_option_is_explained_and_no_other():
    """With its default, where that is a plain value."""
    table = {cells[0].strip("`"): cells for cells in rows("operators.md") if len(cells) == 4}
    table = {name: cells for name, cells in table.items() if re.fullmatch("[a-z_]+", name)}
    table.pop("option")
    assert sorted(table) == sorted(AVMPConfig.model_fields)
    for name, field in AVMPConfig.model_fields.items():
        if field.default is not None:
            shown = table[name][1].strip("`")
            assert shown == str(field.default).replace("False", "false"), name


def _fragments(node: ast.expr) -> list[str]:
    """The literal parts of a message, without what is filled in."""
    parts = [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    pieces = [piece for part in parts for piece in re.split(r"%[-+0-9.]*[a-z]", part)]
    return [" ".join(piece.split()) for piece in pieces]


def messages() -> list[tuple[str, list[str]]]:
    """(where, runs of words) of every log line and error that a user of the engine may read."""
    found = []
    for folder in SPEAKING:
        for path in sorted((ROOT / "avmp_vllm" / folder).rglob("*.py")):
            where = str(path.relative_to(ROOT / "avmp_vllm"))
            for node in ast.walk(ast.parse(path.read_text())):
                call = node.exc if isinstance(node, ast.Raise) else node
                if not isinstance(call, ast.Call) or not call.args:
                    continue
                name = getattr(call.func, "id", getattr(call.func, "attr", ""))
                logs = isinstance(call.func, ast.Attribute) and (
                    getattr(call.func.value, "id", "") == "logger"
                )
                raises = isinstance(node, ast.Raise) and (where, name) not in PROGRAMMING_ERRORS
                if logs or raises:
                    runs = [run for part in _fragments(call.args[0]) for run in _runs(part)]
                    if runs:
                        found.append((f"{where}:{call.lineno}", runs))
    return found


def _runs(part: str) -> list[str]:
    """All runs of four words of a message's literal part, or the whole of a shorter one."""
    words = part.strip(" :;,.='").split()
    if len(words) < 3:
        return []
    return [" ".join(words[start : start + 4]) for start in range(max(len(words) - 3, 1))]


@pytest.mark.parametrize(("where", "runs"), messages(), ids=lambda value: str(value)[:60])
def test_every_message_is_explained(where, runs):
    """A few words of each log line and of each error are quoted, so that a search finds them."""
    text = page("operators.md").replace("`", "")
    assert any(run in text for run in runs), f"docs/operators.md does not explain {where}: {runs}"


def test_messages_are_found():
    """The control: the walk above sees errors and log lines."""
    seen = " ".join(run for _, runs in messages() for run in runs)
    assert "does not work with" in seen
    assert "sequences of one page" in seen
    assert len(messages()) > 25


@pytest.mark.parametrize("command", ["avmp plan", "avmp doctor", "avmp top", "--block-manager"])
def test_operators_are_told_of_the_commands(command):
    assert command in page("operators.md")


# -- what works ------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.option)
def test_every_refusal_has_a_row(refusal):
    """By the option's name, with a test."""
    found = [cells for cells in rows("support.md") if f"`{refusal.option}`" in cells[0]]
    assert len(found) == 1
    assert "tests/" in found[0][-1]


def test_no_row_refuses_an_option_that_is_taken():
    """The other way round."""
    known = {refusal.option for refusal in REFUSALS}
    refused = [
        cells[0]
        for cells in rows("support.md")
        if "test_refused_options" in cells[-1] and cells[0].startswith("`--")
    ]
    assert {re.match("`([^`]+)`", cell)[1] for cell in refused} == known


#: Fields of vLLM's configurations that touch the cache, or when its pages are read and written; the
#: others of these classes do not.
TOUCH = {
    "ParallelConfig": {
        "pipeline_parallel_size",
        "tensor_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_size",
        "enable_expert_parallel",
        "enable_eplb",
        "enable_elastic_ep",
        "enable_dbo",
        "enable_batch_sharded_sampling",
        "worker_cls",
        "worker_extension_cls",
        "distributed_executor_backend",
    },
    "SchedulerConfig": {
        "max_num_batched_tokens",
        "max_num_seqs",
        "long_prefill_token_threshold",
        "enable_chunked_prefill",
        "policy",
        "scheduler_cls",
        "disable_hybrid_kv_cache_manager",
        "scheduler_reserve_full_isl",
        "watermark",
        "prefill_schedule_interval",
        "async_scheduling",
    },
    "SpeculativeConfig": {
        "num_speculative_tokens",
        "model",
        "method",
        "draft_tensor_parallel_size",
        "attention_backend",
        "kv_cache_dtype",
        "parallel_drafting",
        "disable_eagle_block_drop",
        "num_speculative_tokens_per_batch_size",
        "enable_adaptive_verification",
    },
}
#: Of ``CacheConfig`` all do, so that one that a new vLLM adds fails the test; but for these, which
#: vLLM itself fills in.
DERIVED = {
    "is_attention_free",
    "sliding_window",
    "mamba_page_size_padded",
    "skip_page_size_padded",
    "mamba_cache_mode",
}
#: Where an option has another name than its field.
OPTIONS = {"cache_dtype": "kv-cache-dtype", "policy": "scheduling-policy"}


@pytest.mark.parametrize("name", ["CacheConfig", *TOUCH])
def test_every_option_that_touches_the_cache_is_on_the_page(name):
    """In a table, or among those that were tried by hand or not at all."""
    fields = {field.name for field in dataclasses.fields(getattr(vllm.config, name)) if field.init}
    touch = fields - DERIVED if name == "CacheConfig" else TOUCH[name]
    assert touch <= fields
    text = page("support.md")
    for field in sorted(touch):
        flag = "--" + OPTIONS.get(field, field.replace("_", "-"))
        ways = [f"`{field}`"] if name == "SpeculativeConfig" else [f"`{flag}", f"`--no-{flag[2:]}"]
        assert any(way in text for way in ways), flag


def test_every_test_that_a_page_names_exists():
    """File and function."""
    text = "".join(path.read_text() for path in DOCS.glob("*.md"))
    named = set(re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", text))
    assert len(named) > 20
    for file, function in named:
        assert (ROOT / file).is_file(), file
        if function:
            assert f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


def test_every_row_names_a_test():
    """A row without a test would be a promise."""
    table = [cells for cells in rows("support.md") if cells[-1].startswith("`tests/")]
    headed = [cells for cells in rows("support.md") if cells[-1] == "tested by"]
    assert len(headed) == 4
    first = rows("support.md").index(headed[0])
    assert len(table) == len(rows("support.md")) - first - 4


# -- architecture ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seam",
    [*seams.SELECTION, *seams.ENGINE, *seams.API, *seams.RUNNER_V1, *seams.RUNNER_V2],
    ids=lambda seam: seam.path,
)
def test_every_seam_is_listed(seam):
    """One line each."""
    assert any(cells[0] == f"`{seam.path}`" for cells in rows("architecture.md"))


def test_every_page_is_linked_from_the_index():
    """A page that nothing leads to is not read."""
    index = (DOCS / "index.md").read_text()
    for path in DOCS.glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index, path.name
