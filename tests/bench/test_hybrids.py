"""`avmp plan` against vLLM's own layers: every family that it registers as hybrid."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hybrid_specs_constants as sizes
import pytest
from hybrid_configs import CONFIGS

from avmp_vllm.core.caches import Load
from avmp_vllm.core.stock import StockRules, plan_stock
from avmp_vllm.models.shapes import ShapeError, read_shape, shape_of
from avmp_vllm.planner.backends import BACKENDS, LATENT_BACKENDS, SPARSE_BACKENDS

HERE = Path(__file__).parent
MODELS = HERE.parents[1] / "configs" / "models"
LOAD = Load(sizes.STEP, sizes.LONGEST)
#: Architectures whose language model is another's, which their configuration keeps nested or as is.
WRAPS = {
    "BailingMoeV3VLForConditionalGeneration": "BailingMoeV3ForCausalLM",
    "ColBERTLfm2Model": "Lfm2ForCausalLM",
    "ColQwen3_5": "Qwen3_5ForCausalLM",
    "Glm5NextForConditionalGeneration": "Glm5NextForCausalLM",
    "InternS2MobiusForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "InternS2PreviewForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "JambaForSequenceClassification": "JambaForCausalLM",
    "KimiK3ForConditionalGeneration": "KimiLinearForCausalLM",
    "Lfm2VlForConditionalGeneration": "Lfm2ForCausalLM",
    "MiniCPMV4_6ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "MiniCPMV4_7ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "NemotronH_Nano_Omni_Reasoning_V3": "NemotronHForCausalLM",
    "NemotronH_Nano_VL_V2": "NemotronHForCausalLM",
    "NemotronH_Omni_Reasoning_V3": "NemotronHForCausalLM",
    "NemotronH_Super_Omni_Reasoning_V3": "NemotronHForCausalLM",
    "Qwen3_5ForConditionalGeneration": "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForCausalLM",
    "Qwen4ExpForConditionalGeneration": "Qwen4ExpForCausalLM",
}
#: Read, but not built here, and why.
NOT_BUILT = {
    "NemotronHPuzzleForCausalLM": "its configuration's class comes with the checkpoint",
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """What vLLM's own models of ``CONFIGS`` ask for, and the architectures that it registers."""
    out = tmp_path_factory.mktemp("vllm") / "specs.json"
    root = str(HERE.parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, str(HERE)])}
    run = subprocess.run(
        [sys.executable, str(HERE / "hybrid_specs.py"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(out.read_text())


def test_every_registered_hybrid_is_read(vllm):
    """A family that a new vLLM registers fails here, by its name."""
    assert set(vllm["registered"]) == {*CONFIGS, *WRAPS, *NOT_BUILT}


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_those_of_vllm(vllm, name):
    theirs = vllm["families"][name]
    assert "error" not in theirs, theirs
    ours = Counter()
    for cache in shape_of(CONFIGS[name], name).caches().caches:
        ours[cache.role.name, cache.page_bytes(sizes.PAGE)] += cache.layers
    assert ours == Counter(map(tuple, theirs["layers"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_arena_is_the_engines(vllm, name):
    theirs = vllm["families"][name]
    layers = shape_of(CONFIGS[name], name).caches()
    geometry = layers.geometry(sizes.ARENA, sizes.PAGE, LOAD, theirs["alignment"])
    assert [geometry.page_bytes, geometry.block_bytes, geometry.page_tokens] == theirs["geometry"]
    assert [[g.page_tokens, g.most] for g in geometry.more_groups] == theirs["more_groups"]


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_is_what_vllms_own_code_plans(vllm, name):
    theirs = vllm["families"][name]["stock"]
    layers = shape_of(CONFIGS[name], name).caches()
    # The CPU platform's block is a multiple of 128.
    rules = StockRules(128, alignment=vllm["families"][name]["alignment"])
    stock = plan_stock(layers, sizes.ARENA, rules, 2, LOAD)
    assert theirs is not None
    assert stock is not None
    assert sorted([g.page_tokens, g.most or 0] for g in stock.groups) == sorted(
        [tokens, most or 0] for tokens, most in theirs["groups"]
    )
    assert [stock.ssm_groups, stock.states, stock.blocks] == [
        theirs[key] for key in ("ssm_groups", "states", "blocks")
    ]


@pytest.mark.parametrize("name", sorted({*WRAPS.values()}))
@pytest.mark.parametrize("key", ["text_config", "llm_config"])
def test_a_language_model_within_another_is_read_as_itself(name, key):
    config = CONFIGS[name]
    outer = {"model_type": "wrapped", "architectures": config["architectures"], key: config}
    assert shape_of(outer, "x").layers == shape_of(config, "x").layers


def test_layers_that_differ_one_by_one():
    """Nemotron-H pruned by layer: heads, windows and states of their own."""
    config = CONFIGS["NemotronHForCausalLM"] | {
        "model_type": "nemotron_h_puzzle",
        "block_configs": [
            {"block_type": "mamba"},
            {"block_type": "mlp"},
            {"block_type": "attention", "num_key_value_heads": 1},
            {"block_type": "mlp"},
            {"block_type": "mamba", "mamba_num_heads": 4},
            {"block_type": "mamba"},
            {"block_type": "attention", "sliding_window": 100},
        ],
    }
    shape = shape_of(config)
    found = [(layer.role.name, layer.layers, layer.window) for layer in shape.layers]
    assert found == [
        ("SLOTS", 1, None),
        ("WINDOW", 1, 100),
        ("STATE", 2, None),
        ("STATE", 1, None),
    ]
    config["block_configs"] = config["block_configs"][:3]
    with pytest.raises(ShapeError, match="'block_configs' has 3 layers, and there are 7"):
        shape_of(config)


def _smallest_block(path: str) -> int:
    """Of a backend, read from the source of its class: its kernels may be missing here."""
    module, _, name = path.rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for method in node.body:
                if getattr(method, "name", "") == "get_supported_kernel_block_sizes":
                    last = ast.walk(method.body[-1])
                    return min(n.value for n in last if isinstance(n, ast.Constant))
            (base,) = node.bases
            return _smallest_block(f"{module}.{ast.unparse(base)}")
    raise AssertionError(path)


@pytest.mark.parametrize(
    "backend",
    [*BACKENDS.values(), *LATENT_BACKENDS.values(), *SPARSE_BACKENDS.values()],
    ids=lambda backend: backend.name,
)
def test_backends_take_the_pages_that_are_assumed(backend):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert _smallest_block(AttentionBackendEnum[backend.name].value) == backend.tokens


def test_replays_refuse_what_they_cannot_replay():
    shape = shape_of(CONFIGS["Glm5NextForCausalLM"], "glm")
    with pytest.raises(
        ShapeError, match="glm: its layers keep MLA, compressed keys, raw keys, KDA"
    ):
        shape.ssm_layers  # noqa: B018
    assert read_shape(str(MODELS / "jamba-1.5-mini.json")).ssm_layers == 28
