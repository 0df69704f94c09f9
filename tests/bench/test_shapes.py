"""Model shapes read from configuration files, against vLLM's own calculators and known blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from avmp_vllm.core.caches import Layers, Load
from avmp_vllm.core.capacity import stock_groups
from avmp_vllm.core.stock import StockRules, plan_stock
from avmp_vllm.models.shapes import ShapeError, read_shape, shape_of

MODELS = Path(__file__).parents[2] / "configs" / "models"


def _layers(name: str, kv_dtype: str = "auto", state_dtype: str = "auto") -> Layers:
    shape = read_shape(str(MODELS / f"{name}.json"))
    return shape.with_state_dtype(state_dtype).caches(kv_dtype)


@pytest.mark.parametrize(
    ("name", "kv_dtype", "state_dtype", "block", "groups"),
    [
        ("jamba-1.5-mini", "auto", "bfloat16", 80, 8),
        ("jamba-reasoning-3b", "auto", "float32", 704, 14),
        ("qwen3.5-35b-a3b", "auto", "bfloat16", 544, 4),
        ("qwen3.5-35b-a3b", "fp8", "float32", 2096, 4),
        ("kimi-linear-48b-a3b", "auto", "float32", 1888, 4),
        ("nemotron-3-nano-30b-a3b", "auto", "float32", 2096, 5),
    ],
)
def test_stock_block_and_groups(name, kv_dtype, state_dtype, block, groups):
    layers = _layers(name, kv_dtype, state_dtype)
    plan = plan_stock(layers, 8 << 30, StockRules(16), 1, Load(8192, 32768))
    assert plan is not None
    assert plan.block_tokens == block
    assert plan.tables == groups


def test_latent_cache_is_rounded_to_128():
    """vLLM 0.32 rounds a hybrid model's block to 128 tokens where the cache is latent."""
    from avmp_vllm.planner.plan import make_plan

    plan = make_plan(read_shape(str(MODELS / "kimi-linear-48b-a3b.json")), 8 << 30)
    assert plan.stock is not None
    assert plan.stock.block_tokens == 1920


@pytest.mark.parametrize(
    ("layers", "expected"),
    [((4, 28), (4, 1, 7)), ((10, 12), (12, 1, 1)), ((6, 23), (6, 1, 4)), ((24, 24), (24, 1, 1))],
)
def test_groups(layers, expected):
    assert stock_groups(*layers) == expected


@pytest.mark.parametrize("writer", ["granite_hybrid", "nemotron_h", "falcon_h1"])
def test_states_are_those_of_vllm(writer, tmp_path):
    """The tiny checkpoints' states, against vLLM's shape calculator."""
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator

    from avmp_vllm.models import tiny_hybrids

    shape = read_shape(str(getattr(tiny_hybrids, f"write_tiny_{writer}")(tmp_path)))
    conv, state = MambaStateShapeCalculator.mamba2_state_shape(
        tp_world_size=1,
        intermediate_size=256,
        n_groups=1,
        num_heads=8,
        head_dim=32,
        state_size=16,
        conv_kernel=4,
    )
    assert [part for part, _ in shape.state_parts] == [conv, state]
    expected = {"granite_hybrid": (2, 4), "nemotron_h": (2, 2), "falcon_h1": (4, 4)}
    assert (shape.kv_layers, shape.ssm_layers) == expected[writer]
    assert shape.token_bytes() == 2 * 2 * 32 * 4


def test_every_model_file_names_its_source():
    files = sorted(MODELS.glob("*.json"))
    assert len(files) == 6
    for file in files:
        shape = read_shape(str(file))
        assert shape.source
        assert shape.parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "jambo"}, "unknown model_type 'jambo' \\(did you mean 'jamba'"),
        ({"attn_layer_period": None}, "key 'attn_layer_period' is missing"),
        ({"hidden_size": -1}, "key 'hidden_size' must be a positive integer, not -1"),
        ({"dtype": "float3"}, "unknown dtype 'float3'; known: float32"),
        ({"attn_layer_offset": 9}, "no attention layers"),
    ],
)
def test_errors_name_the_key(change, message):
    config = json.loads((MODELS / "jamba-1.5-mini.json").read_text()) | change
    with pytest.raises(ShapeError, match=message):
        shape_of(config, "file.json")


def test_a_broken_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{\n "a": 1,\n oops\n}')
    with pytest.raises(ShapeError, match=r"config\.json:3: is not JSON"):
        read_shape(str(path))
    with pytest.raises(ShapeError, match="no such configuration file"):
        read_shape(str(tmp_path / "missing.json"))
