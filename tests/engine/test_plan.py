"""`avmp plan` against live engines: AVMP's start-up log and stock vLLM's own figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from enginelib import engine, scheduler_of
from vllm.v1.kv_cache_interface import FullAttentionSpec

from avmp_vllm.cli import main
from avmp_vllm.engine.entry.options import DRAFTERS
from avmp_vllm.engine.layout.capacity import describe
from avmp_vllm.models.drafts import METHODS, Drafts
from avmp_vllm.models.shapes import read_shape
from avmp_vllm.planner.command import parse_bytes, parse_lengths
from avmp_vllm.planner.plan import make_plan

MEMORY = 24 << 20
MODELS = Path(__file__).parents[2] / "configs" / "models"


def _plan(model: str, caching: bool):
    # Pages of 32 tokens, stock's block a multiple of 128.
    return make_plan(
        read_shape(model),
        MEMORY,
        backend="CPU_ATTN",
        prefix_caching=caching,
        max_model_len=512,
    )


@pytest.mark.parametrize("caching", [False, True])
def test_plan_is_what_stock_vllm_says(tiny_jamba, caplog_vllm, caching):
    plan = _plan(tiny_jamba, caching)
    with engine(tiny_jamba, kv_cache_memory_bytes=MEMORY, enable_prefix_caching=caching) as llm:
        scheduler = scheduler_of(llm)
        cache = scheduler.vllm_config.cache_config
        assert cache.num_gpu_blocks == plan.stock.blocks + 1
        assert cache.kv_cache_size_tokens == plan.stock.logged_tokens(512)
        groups = scheduler.kv_cache_config.kv_cache_groups
        assert len(groups) == plan.stock.tables
        attention = [g for g in groups if isinstance(g.kv_cache_spec, FullAttentionSpec)]
        blocks = {g.kv_cache_spec.block_size for g in attention}
        assert blocks == {plan.stock.block_tokens}
    logged = re.findall(r"KV cache size: ([\d,]+) tokens", caplog_vllm.text)
    # vLLM logs the line once in a process for each text.
    assert not logged or int(logged[-1].replace(",", "")) == plan.stock.logged_tokens(512)


@pytest.mark.parametrize("caching", [False, True])
def test_plan_is_what_avmp_logs(tiny_jamba, caching):
    plan = _plan(tiny_jamba, caching)
    with engine(
        tiny_jamba, avmp={}, kv_cache_memory_bytes=MEMORY, enable_prefix_caching=caching
    ) as llm:
        scheduler = scheduler_of(llm)
        assert scheduler.kv_cache_manager.geometry == plan.geometry
        # The lines that the engine has logged at start-up.
        text = "\n".join(describe(scheduler.vllm_config, scheduler.kv_cache_config))
    assert f"KV page    {plan.geometry.page_bytes:>12,} bytes" in text
    assert f"SSM block  {plan.geometry.block_bytes:>12,} bytes" in text
    assert f"stock vLLM: block of {plan.stock.block_tokens} tokens, {plan.stock.blocks:,}" in text
    rows = re.findall(r"([\d,]+)\s+([\d,]+)\s+([\d,]+)\s+([\d,]+)\s+(KV|SSM)$", text, re.M)
    assert len(rows) == 2
    for row in rows:
        tokens, avmp, together, stock = (int(cell.replace(",", "")) for cell in row[:4])
        fit = plan.sequences(tokens)
        assert (fit["AVMP"], fit["AVMP"] * tokens, fit["stock"]) == (avmp, together, stock)
        assert fit["limit"] >= fit["AVMP"] > 0
        assert fit["limit"] >= fit["static"] > 0


def test_limit_bounds_every_variant(tiny_jamba):
    plan = _plan(tiny_jamba, True)
    for tokens in (1, 33, 200, 512, 5000):
        fit = plan.sequences(tokens)
        assert fit["limit"] == max(fit.values())


def test_command(tiny_jamba, capsys):
    assert main(["plan", tiny_jamba, "--memory", "24MiB", "--lengths", "64,1k"]) == 0
    printed = capsys.readouterr().out
    plan = make_plan(read_shape(tiny_jamba), MEMORY)
    for tokens in (64, 1024):
        for count in plan.sequences(tokens).values():
            assert f"{count:,} / {count * tokens:,}" in printed
    assert f"KV cache size: {plan.stock.logged_tokens(8192):,} tokens" in printed
    assert "in chunks of 2,097,152 bytes" in printed
    assert "cache 2,097,152 bytes have memory instead of 25,165,824" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --memory or --gpu"),
        (["--gpu", "rtx0"], "--gpu rtx0: unknown card; known: rtx3060"),
        (["--gpu", "rtx3060"], "number of parameters: give --parameters"),
        (["--gpu", "rtx3060", "--parameters", "9e9"], "nothing is left for the cache"),
        (["--memory", "100"], "holds no page of each kind"),
        (["--memory", "1GiB", "--kv-dtype", "fp7"], "unknown dtype 'fp7'"),
    ],
)
def test_errors_are_one_line(tiny_jamba, capsys, arguments, message):
    assert main(["plan", tiny_jamba, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_card_subtracts_weights_and_reserve(tiny_jamba, capsys):
    assert main(["plan", tiny_jamba, "--gpu", "rtx3060", "--parameters", "1e9"]) == 0
    left = int(12 * 2**30 * 0.92) - 4_000_000_000 - 2**30
    assert f"{left:,} bytes for the cache" in capsys.readouterr().out


def test_json_is_the_plan(tiny_jamba, capsys):
    assert main(["plan", tiny_jamba, "--memory", "24MiB", "--lengths", "64", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    plan = make_plan(read_shape(tiny_jamba), MEMORY)
    assert printed["fits"] == [{"tokens": 64, **plan.sequences(64)}]
    assert printed["page_bytes"] == plan.geometry.page_bytes
    assert [table["layers"] for table in printed["tables"]] == [2]
    assert printed["backend"] == "FLASH_ATTN"
    assert printed["stock"]["tables"] == plan.stock.tables


def test_several_tables_are_listed(tmp_path, capsys):
    """A window beside full attention, and what a request holds of it."""
    config = {
        "model_type": "nemotron_h_puzzle",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "mamba_num_heads": 8,
        "mamba_head_dim": 48,
        "n_groups": 2,
        "ssm_state_size": 16,
        "block_configs": [
            {"block_type": "mamba"},
            {"block_type": "attention"},
            {"block_type": "attention", "sliding_window": 100},
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["plan", str(tmp_path), "--memory", "64MiB", "--step-tokens", "256"]
    assert main([*words, "--lengths", "4096"]) == 0
    printed = capsys.readouterr().out
    most = -(-(99 + 256) // 16) + 1
    assert re.search(rf"the last tokens\s+│\s+1 │\s+16 │\s+{most} at most", printed)
    assert main([*words, "--lengths", "4096", "--json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert [(table["role"], table["most_pages"]) for table in tables] == [
        ("slots", None),
        ("window", most),
    ]


@pytest.mark.parametrize(
    ("model", "words", "backend", "page"),
    [
        ("jamba-reasoning-3b", ["--gpu", "rtx3060"], "FLASH_ATTN", 16),
        ("kimi-linear-48b-a3b", ["--memory", "40GiB"], "FLASH_ATTN_MLA", 16),
        ("kimi-linear-48b-a3b", ["--memory", "40GiB", "--backend", "FLASHMLA"], "FLASHMLA", 64),
        ("kimi-linear-48b-a3b", ["--memory", "9GiB", "--backend", "CUTLASS_MLA"], "", 128),
    ],
)
def test_pages_are_the_backends(model, words, backend, page, capsys):
    path = str(MODELS / f"{model}.json")
    assert main(["plan", path, *words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert backend in printed["backend"]
    assert printed["tables"][0]["page_tokens"] == page


def test_a_backend_of_other_models_is_an_error(tiny_jamba, capsys):
    assert main(["plan", tiny_jamba, "--memory", "1GiB", "--backend", "FLASHMLA"]) == 2
    assert "is not served by it; known: FLASH_ATTN" in capsys.readouterr().err


# -- drafts -------------------------------------------------------------------------------------


def _granite(**drafts):
    shape = read_shape(str(MODELS / "granite-4.0-h-tiny.json"))
    return make_plan(shape, 1 << 30, drafts=Drafts(**drafts) if drafts else None)


def test_a_sequence_holds_a_state_more_for_each_draft():
    """And a convolution as many inputs more; the state itself and the pages stay."""
    plain, drafting = _granite(), _granite(tokens=4, method="ngram")
    assert (plain.states, drafting.states) == (2, 6)
    (before,), (after,) = plain.layers.states, drafting.layers.states
    channels = 2 * plain.shape.layers[1].parts[0].shape[1]  # in bf16
    assert after.entry_bytes - before.entry_bytes == 4 * channels
    assert drafting.geometry.page_bytes == plain.geometry.page_bytes
    assert drafting.sequences(4096)["AVMP"] < plain.sequences(4096)["AVMP"]
    assert drafting.stock.states == 6


def test_a_drafter_has_layers_of_its_own(tmp_path):
    """In the model's layout, or in another."""
    plain = _granite()
    attention = plain.shape.attention
    heads = attention.parts[0].shape[1]
    page = plain.layers.attention.page_bytes(16)
    for kv_heads, layers in ((heads, [attention.layers + 1]), (1, [attention.layers, 1])):
        config = {
            "model_type": "llama",
            "hidden_size": 64 * heads,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": attention.parts[0].shape[2],
            "num_hidden_layers": 1,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan = _granite(tokens=2, method="eagle", model=str(tmp_path))
        (table,) = plan.tables
        assert [layout.layers for layout in table.layouts] == layers
        assert table.page_bytes - plain.tables[0].page_bytes == page * kv_heads // heads


@pytest.mark.parametrize(
    ("model", "option", "message"),
    [
        ("granite-4.0-h-tiny", "{", "{: is not JSON"),
        ("granite-4.0-h-tiny", "[]", "[]: is no JSON object"),
        ("granite-4.0-h-tiny", {"method": "medusa"}, "'medusa' is none of ngram, mtp, eagle"),
        ("granite-4.0-h-tiny", {"method": "ngram"}, "'num_speculative_tokens' is missing"),
        ("granite-4.0-h-tiny", {"method": "mtp", "num_speculative_tokens": 1}, "no MTP layers"),
        ("granite-4.0-h-tiny", {"method": "eagle"}, "needs the key 'model'"),
        ("jamba-reasoning-3b", {"method": "ngram", "num_speculative_tokens": 1}, "has Mamba-1"),
    ],
)
def test_drafts_that_cannot_be_are_one_line(capsys, model, option, message):
    text = option if isinstance(option, str) else json.dumps(option)
    words = ["--memory", "8GiB", "--speculative-config", text]
    assert main(["plan", str(MODELS / f"{model}.json"), *words]) == 2
    error = capsys.readouterr().err
    assert "--speculative-config" in error
    assert message in error
    assert error.count("\n") == 1


def test_drafts_are_printed_and_counted(tmp_path, capsys):
    config = json.loads((MODELS / "qwen3.5-35b-a3b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "mtp_num_hidden_layers": 1}))
    option = json.dumps({"method": "qwen3_5_mtp", "num_speculative_tokens": 3})
    words = ["plan", str(tmp_path), "--memory", "8GiB", "--speculative-config", option]
    assert main(words) == 0
    assert "drafts: 3 tokens by mtp, a state more for each" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["states"], printed["speculative_tokens"]) == (5, 3)
    assert printed["layers"][0]["layers"] == 40 // 4 + 1


def test_the_planner_knows_the_engines_drafters():
    assert METHODS == DRAFTERS


def test_sizes_and_lengths():
    assert parse_bytes("5GiB") == 5 << 30
    assert parse_bytes("1.5 MB") == 1_500_000
    assert parse_lengths("64,1k") == [64, 1024]
