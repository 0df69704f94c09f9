"""How the configuration of each family of hybrids is read: one row of ``FAMILIES`` a family.

Every family that vLLM 0.32 registers as hybrid is here, and a test builds vLLM's own layers from
the same configurations and compares. Models with a vision or audio tower are read by the
configuration of their language model (``NESTED``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from avmp_vllm.core.geometry import ceil_div
from avmp_vllm.core.tables import Role
from avmp_vllm.models.layers import (
    MODEL,
    Keys,
    LayerShape,
    Part,
    ShapeError,
    attention,
    convolution,
    latent_attention,
    one_state,
    states,
)

#: Keys under which a model with further towers keeps its language model's configuration.
NESTED = ("text_config", "llm_config", "language_config")


class Read(NamedTuple):
    """What a family's reader finds.

    Attributes:
        layers: By layout.
        state_dtype: Of the recurrent state, where the family has one of its own.
    """

    layers: list[LayerShape]
    state_dtype: str | None = None


_KV_NAMES = ("attention", "full_attention", "indexed_attention", "qwen_sparse_attention", "*")
_SSM_NAMES = ("mamba", "mamba2", "linear_attention", "conv", "M")


def _listed(keys: Keys, *names: str) -> tuple[int, int]:
    """Attention and SSM layers of a list of layer types."""
    kinds = list(keys.one_of(*names))
    return sum(k in _KV_NAMES for k in kinds), sum(k in _SSM_NAMES for k in kinds)


def _every(keys: Keys, default: int = 4) -> tuple[int, int]:
    """Attention and SSM layers where every so many layers there is attention."""
    if keys.get("layer_types"):
        return _listed(keys, "layer_types")
    layers = keys.size("num_hidden_layers")
    kv = layers // keys.size("full_attention_interval", default=default)
    return kv, layers - kv


def _split_head(keys: Keys) -> int:
    """Channels of a head in models whose ``head_dim`` vLLM does not read."""
    return keys.size("hidden_size") // keys.size("num_attention_heads")


def _conv(keys: Keys, *names: str, default: int = 4) -> int:
    """Positions of a convolution that a state keeps."""
    return keys.size(*names, default=default) - 1


def _jamba(keys: Keys) -> Read:
    layers = keys.size("num_hidden_layers")
    period = keys.size("attn_layer_period")
    offset = keys.get("attn_layer_offset", 0)
    kv = sum(index % period == offset for index in range(layers))
    inner = keys.size("mamba_expand", default=2) * keys.size("hidden_size")
    conv = (_conv(keys, "mamba_d_conv"), inner)
    state = (inner, keys.size("mamba_d_state", default=16))
    mamba = states("Mamba-1", layers - kv, conv, state)
    return Read([attention(keys, kv, _split_head(keys)), mamba])


def _mamba2(
    layers: int, kernel: int, inner: int, groups: int, heads: int, size: int, state: int
) -> LayerShape:
    """Layers of Mamba-2; ``kernel`` positions are kept."""
    conv = (kernel, inner + 2 * groups * state)
    return states("Mamba-2", layers, conv, (heads, size, state))


def _prefixed_mamba2(keys: Keys, layers: int, inner: int) -> LayerShape:
    return _mamba2(
        layers,
        _conv(keys, "mamba_d_conv"),
        inner,
        keys.size("mamba_n_groups"),
        keys.size("mamba_n_heads"),
        keys.size("mamba_d_head"),
        keys.size("mamba_d_state"),
    )


def _granite(keys: Keys) -> Read:
    kv, ssm = _listed(keys, "layer_types", "layers_block_type")
    inner = keys.size("mamba_expand", default=2) * keys.size("hidden_size")
    layers = [attention(keys, kv, _split_head(keys)), _prefixed_mamba2(keys, ssm, inner)]
    return Read(layers)


def _nemotron(keys: Keys) -> Read:
    """Layers may differ one by one, by ``block_configs``."""
    kinds: Sequence[str] = keys.one_of(
        "layers_block_type", "layer_types", "hybrid_override_pattern", "block_configs"
    )
    blocks: Sequence[Any] = keys.get("block_configs", [{}] * len(kinds))
    if len(blocks) != len(kinds):
        raise ShapeError(
            f"{keys.name}: key 'block_configs' has {len(blocks)} layers, and there are {len(kinds)}"
        )
    layers = []
    for kind, block in zip(kinds, blocks, strict=True):
        name = kind["block_type"] if isinstance(kind, dict) else kind
        own = keys.but(block)
        if name in _KV_NAMES:
            layers.append(attention(own, 1))
        elif name in _SSM_NAMES:
            layers.append(_nemotron_mamba(own))
    return Read(_counted(layers), keys.get("mamba_ssm_cache_dtype", "float32"))


def _nemotron_mamba(keys: Keys) -> LayerShape:
    heads, size = keys.size("mamba_num_heads"), keys.size("mamba_head_dim")
    return _mamba2(
        1,
        _conv(keys, "conv_kernel", "mamba_d_conv"),
        heads * size,
        keys.size("n_groups", "mamba_n_groups"),
        heads,
        size,
        keys.size("ssm_state_size"),
    )


def _counted(layers: Iterable[LayerShape]) -> list[LayerShape]:
    """Single layers by what they keep, with their number."""
    counts = Counter(layers)
    return [
        LayerShape(layer.what, layer.role, number, layer.parts, window=layer.window)
        for layer, number in counts.items()
    ]


def _falcon(keys: Keys) -> Read:
    layers = keys.size("num_hidden_layers")
    expanded = int(keys.get("mamba_expand", 2) * keys.size("hidden_size"))
    inner = keys.size("mamba_d_ssm", default=expanded)
    return Read([attention(keys, layers), _prefixed_mamba2(keys, layers, inner)])


def _zamba2(keys: Keys) -> Read:
    """A hybrid layer has attention over twice the hidden size, and Mamba-2."""
    kinds = list(keys.one_of("layers_block_type"))
    hidden, count = keys.size("hidden_size"), keys.size("num_attention_heads")
    heads, state = keys.size("n_mamba_heads", default=8), keys.size("mamba_d_state", default=64)
    inner = keys.size("mamba_expand", default=2) * hidden
    mamba = _mamba2(
        len(kinds),
        _conv(keys, "mamba_d_conv"),
        inner,
        keys.size("mamba_ngroups", default=1),
        heads,
        inner // heads,
        state,
    )
    own = keys.but({"num_key_value_heads": count})
    return Read([attention(own, kinds.count("hybrid"), 2 * hidden // count), mamba])


def _lfm2(keys: Keys) -> Read:
    layers = keys.size("num_hidden_layers")
    if keys.get("layer_types"):
        kv, conv = _listed(keys, "layer_types")
    else:
        kv = len(keys.one_of("full_attn_idxs"))
        conv = layers - kv
    dense = keys.get("model_type") == "lfm2"
    names = ("conv_dim", "hidden_size") if dense else ("hidden_size",)
    shape = (_conv(keys, "conv_L_cache", default=3), keys.size(*names))
    return Read([attention(keys, kv, _split_head(keys)), convolution(conv, shape)])


def _gated_delta_net(keys: Keys, layers: int) -> LayerShape:
    k_heads, v_heads = keys.size("linear_num_key_heads"), keys.size("linear_num_value_heads")
    k_size, v_size = keys.size("linear_key_head_dim"), keys.size("linear_value_head_dim")
    channels = 2 * k_heads * k_size + v_heads * v_size
    conv = (_conv(keys, "linear_conv_kernel_dim"), channels)
    return states("gated delta net", layers, conv, (v_heads, v_size, k_size))


def _qwen3(keys: Keys) -> Read:
    kv, ssm = _every(keys)
    return Read([attention(keys, kv), _gated_delta_net(keys, ssm)], keys.get("mamba_ssm_dtype"))


def _olmo(keys: Keys) -> Read:
    """Heads of the linear layers follow those of attention unless the file tells."""
    kv, ssm = _every(keys)
    count = keys.size("num_attention_heads")
    k_heads = keys.size("linear_num_key_heads", default=count)
    k_size = keys.size(
        "linear_key_head_dim", default=max(int(0.75 * keys.size("hidden_size") / k_heads), 1)
    )
    own = keys.but(
        {
            "linear_num_key_heads": k_heads,
            "linear_num_value_heads": keys.size("linear_num_value_heads", default=count),
            "linear_key_head_dim": k_size,
            "linear_value_head_dim": keys.size("linear_value_head_dim", default=2 * k_size),
        }
    )
    return Read([attention(keys, kv, _split_head(keys)), _gated_delta_net(own, ssm)])


def _qwen4(keys: Keys) -> Read:
    """Indexers keep a key a group of tokens, and a ring of raw keys; PLE layers a convolution."""
    kv, ssm = _every(keys)
    layers = [attention(keys, kv)]
    if keys.get("indexer_n_heads") is not None:
        size, ratio = keys.size("indexer_head_dim"), keys.size("indexer_compress_ratio")
        layers.append(
            LayerShape(
                "compressed keys", Role.SLOTS, kv, (Part((size,), MODEL),), ratio, latent=True
            )
        )
        raw = ceil_div(size, 4) * 4 + 3 * 4 if _has_axes(keys) else size  # three int64 positions
        layers.append(
            LayerShape("raw keys", Role.RING, kv, (Part((raw,), "bfloat16"),), window=ratio)
        )
    layers.append(_gated_delta_net(keys, ssm))
    if ple := len(set(keys.get("ple_layer_ids", ()))):
        positions = _conv(keys, "ple_conv_kernel_size") * keys.size("ngram_size", default=3)
        channels = keys.size("hidden_size") * keys.size("hc_count", default=4)
        layers.append(convolution(ple, (positions, channels), replicated=True))
    return Read(layers, keys.get("mamba_ssm_dtype"))


def _has_axes(keys: Keys) -> bool:
    """Whether positions have several axes (M-RoPE), which a ring keeps beside its keys."""
    rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    return "mrope_section" in rope


def _delta_attention(layers: int, heads: int, size: int, kernel: int) -> LayerShape:
    """KDA: states in fp32 unless the option says otherwise."""
    return states("KDA", layers, (kernel, 3 * heads * size), (heads, size, size))


def _kimi(keys: Keys) -> Read:
    linear = Keys(f"{keys.name}: linear_attn_config", keys.one_of("linear_attn_config"))
    layers = keys.size("num_hidden_layers")
    kda = sum(1 <= index <= layers for index in set(linear.one_of("kda_layers")))
    own = _delta_attention(
        kda,
        linear.size("num_heads"),
        linear.size("head_dim"),
        _conv(linear, "short_conv_kernel_size"),
    )
    return Read([latent_attention(keys, layers - kda), own], "float32")


def _bailing(keys: Keys) -> Read:
    """Ling 2.5 (lightning attention) and 3 (KDA) share a model type; the architecture tells."""
    layers, every = keys.size("num_hidden_layers"), keys.size("layer_group_size")
    count, hidden = keys.size("num_attention_heads"), keys.size("hidden_size")
    size = keys.size("head_dim", default=hidden // count)
    if any("V2_5" in name for name in keys.get("architectures", ())):
        kv = layers // every
        own = one_state("lightning attention", layers - kv, (count, size, size))
        return Read([latent_attention(keys, kv), own])
    kda = layers // every * (every - 1)  # what is left over at the end has attention
    own = _delta_attention(kda, count, size, _conv(keys, "short_conv_kernel_size"))
    return Read([latent_attention(keys, layers - kda), own], "float32")


def _glm(keys: Keys) -> Read:
    """Every MLA layer has an indexer: compressed keys, and a ring of the open group's raw ones."""
    kv, ssm = _every(keys)
    size, pool = keys.size("index_head_dim", default=128), keys.size("index_kpool", default=16)
    linear = Keys(keys.name, keys.get("linear_attn_config", {}))
    heads = linear.size("num_heads", default=keys.size("linear_num_heads", default=64))
    channels = linear.size("head_dim", default=keys.size("linear_head_dim", default=128))
    kernel = keys.size("linear_conv_kernel_dim", default=4)
    quantized = size + ceil_div(size, 128) * 4  # fp8, with an fp32 scale for each 128
    return Read(
        [
            latent_attention(keys, kv),
            LayerShape(
                "compressed keys", Role.SLOTS, kv, (Part((quantized,), "int8"),), pool, latent=True
            ),
            LayerShape("raw keys", Role.RING, kv, (Part((2, size), "bfloat16"),), window=pool),
            _delta_attention(
                ssm, heads, channels, _conv(linear, "short_conv_kernel_size", default=kernel)
            ),
        ],
        "float32",
    )


class Family(NamedTuple):
    """How to read a ``model_type``, and where that reading comes from."""

    read: Callable[[Keys], Read]
    source: str


_VLLM = "vLLM 0.32, get_mamba_state_shape_from_config of "
FAMILIES: dict[str, Family] = {
    "jamba": Family(_jamba, _VLLM + "models/jamba.py (Mamba-1)"),
    "granitemoehybrid": Family(_granite, _VLLM + "models/granitemoehybrid.py (Mamba-2)"),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_puzzle"),
        Family(_nemotron, _VLLM + "models/nemotron_h.py (Mamba-2; states fp32)"),
    ),
    "falcon_h1": Family(_falcon, _VLLM + "models/falcon_h1.py (Mamba-2 beside attention)"),
    "zamba2": Family(_zamba2, _VLLM + "models/zamba2.py (Mamba-2 in every layer)"),
    **dict.fromkeys(
        ("lfm2", "lfm2_moe"),
        Family(_lfm2, _VLLM + "models/lfm2.py, lfm2_moe.py (short convolution)"),
    ),
    "olmo_hybrid": Family(_olmo, _VLLM + "models/olmo_hybrid.py (gated delta net)"),
    "qwen3_next": Family(_qwen3, _VLLM + "models/qwen3_next.py (gated delta net)"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        Family(_qwen3, _VLLM + "models/qwen3_5.py (gated delta net)"),
    ),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"),
        Family(_qwen4, "vLLM 0.32, models/qwen4_exp (gated delta net, PLE, QSA's caches)"),
    ),
    **dict.fromkeys(
        ("kimi_linear", "kimi_k3"),
        Family(_kimi, "vLLM 0.32, kda_state_shape and kda_state_dtype (KDA, states fp32; MLA)"),
    ),
    "bailing_hybrid": Family(
        _bailing, _VLLM + "models/bailing_moe_linear.py (lightning), bailing_moe_v3.py (KDA); MLA"
    ),
    **dict.fromkeys(
        ("glm5_next", "glm5_next_text"),
        Family(_glm, "vLLM 0.32, models/glm5next (KDA, MLA, indexers with their rings)"),
    ),
}
