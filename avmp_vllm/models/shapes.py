"""What a model keeps per token and per sequence, read from its ``config.json`` alone.

Neither torch nor vLLM is imported: a family is one row of ``FAMILIES``, a function from the
configuration's keys to layers and sizes. Sizes are per rank of a tensor parallel group of one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

#: Bytes of an element by the names that configurations and options use.
DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "fp32": 4,
    "fp16": 2,
    "bf16": 2,
    "half": 2,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
    "int8": 1,
}
#: Key under which our own configuration files name their source; other readers ignore it.
NOTES = "avmp"


class ShapeError(ValueError):
    """A model's configuration that cannot be read; names the file and the key."""


@dataclass(frozen=True)
class ModelShape:
    """Layers of a hybrid model and what each keeps.

    Attributes:
        name: Where it was read from.
        model_type: Key of ``FAMILIES``.
        kv_layers: Full-attention layers.
        kv_heads: KV heads of each; 1 with a latent (MLA) cache.
        token_elements: Cached elements of one token in one attention layer, keys and values.
        latent: The cache is a latent one (MLA).
        ssm_layers: Layers with a state.
        conv_shape: Convolution state of one layer: positions, channels.
        state_shape: Recurrent state of one layer.
        dtype: Of the model, which is also the caches' unless said otherwise.
        state_dtype: Of the recurrent state.
        max_model_len: Positions that the configuration allows.
        parameters: Of the whole model, if the file tells.
        active_parameters: Of them, those that one token passes, if the file tells.
        source: Of the figures, if the file tells.
        assumed: Values that the file's author assumed.
    """

    name: str
    model_type: str
    kv_layers: int
    kv_heads: int
    token_elements: int
    latent: bool
    ssm_layers: int
    conv_shape: tuple[int, ...]
    state_shape: tuple[int, ...]
    dtype: str
    state_dtype: str
    max_model_len: int
    parameters: float | None = None
    active_parameters: float | None = None
    source: str = ""
    assumed: tuple[str, ...] = ()

    def token_bytes(self, kv_dtype: str = "auto") -> int:
        """Bytes of one token in one attention layer."""
        dtype = self.dtype if kv_dtype == "auto" else kv_dtype
        return self.token_elements * dtype_bytes(dtype)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's convolution and recurrent state in one SSM layer."""
        conv = _product(self.conv_shape) * dtype_bytes(self.dtype)
        return conv + _product(self.state_shape) * dtype_bytes(self.state_dtype)

    def with_state_dtype(self, dtype: str) -> ModelShape:
        """The same model with its recurrent state in another type (``auto``: unchanged)."""
        return self if dtype == "auto" else replace(self, state_dtype=dtype)


def dtype_bytes(name: str) -> int:
    """Bytes of an element.

    Raises:
        ShapeError: An unknown name, with those that are known.
    """
    if name not in DTYPE_BYTES:
        raise ShapeError(f"unknown dtype {name!r}; known: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


def _product(numbers: Sequence[int]) -> int:
    value = 1
    for number in numbers:
        value *= number
    return value


class _Keys:
    """A configuration's keys, with errors that name what is missing."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self.name = name
        self.values = values

    def get(self, key: str, default: Any = None) -> Any:
        """A key's value, or the default where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def one_of(self, *keys: str, default: Any = None) -> Any:
        """Value of the first key that is there."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        if default is not None:
            return default
        raise ShapeError(
            f"{self.name}: key {' or '.join(map(repr, keys))} is missing (model_type "
            f"{self.values.get('model_type')!r} needs it)"
        )

    def size(self, *keys: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.one_of(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ShapeError(
                f"{self.name}: key {keys[0]!r} must be a positive integer, not {value!r}"
            )
        return value

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        return self.size("head_dim", default=hidden // heads)


class _Layers(NamedTuple):
    """What a family's reader finds."""

    kv_layers: int
    kv_heads: int
    token_elements: int
    ssm_layers: int
    conv_shape: tuple[int, ...]
    state_shape: tuple[int, ...]
    state_dtype: str | None = None
    latent: bool = False


def _attention(keys: _Keys) -> tuple[int, int]:
    """KV heads, and elements of a token: keys and values of every head."""
    heads = keys.size("num_key_value_heads", default=keys.size("num_attention_heads"))
    return heads, 2 * heads * keys.head_size


def _jamba(keys: _Keys) -> _Layers:
    layers = keys.size("num_hidden_layers")
    period = keys.size("attn_layer_period")
    offset = keys.get("attn_layer_offset", 0)
    kv = sum(index % period == offset for index in range(layers))
    inner = keys.size("mamba_expand", default=2) * keys.size("hidden_size")
    conv = (keys.size("mamba_d_conv", default=4) - 1, inner)
    state = (inner, keys.size("mamba_d_state", default=16))
    return _Layers(kv, *_attention(keys), layers - kv, conv, state)


_KV_NAMES = ("attention", "full_attention", "*")
_SSM_NAMES = ("mamba", "mamba2", "linear_attention", "M")


def _listed(keys: _Keys, *names: str) -> tuple[int, int]:
    """Attention and SSM layers of a list of layer types."""
    kinds = list(keys.one_of(*names))
    return sum(k in _KV_NAMES for k in kinds), sum(k in _SSM_NAMES for k in kinds)


def _mamba2(keys: _Keys, prefix: bool, inner: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a Mamba-2 layer; key names with or without the ``mamba_`` prefix."""
    if prefix:
        heads, size = keys.size("mamba_n_heads"), keys.size("mamba_d_head")
        groups, state = keys.size("mamba_n_groups"), keys.size("mamba_d_state")
        kernel = keys.size("mamba_d_conv", default=4)
    else:
        heads, size = keys.size("mamba_num_heads"), keys.size("mamba_head_dim")
        groups, state = keys.size("n_groups"), keys.size("ssm_state_size")
        kernel = keys.size("conv_kernel", default=4)
    return (kernel - 1, inner + 2 * groups * state), (heads, size, state)


def _granite(keys: _Keys) -> _Layers:
    kv, ssm = _listed(keys, "layer_types", "layers_block_type")
    inner = keys.size("mamba_expand", default=2) * keys.size("hidden_size")
    return _Layers(kv, *_attention(keys), ssm, *_mamba2(keys, True, inner))


def _nemotron(keys: _Keys) -> _Layers:
    kv, ssm = _listed(keys, "hybrid_override_pattern", "layers_block_type", "layer_types")
    inner = keys.size("mamba_num_heads") * keys.size("mamba_head_dim")
    dtype = keys.get("mamba_ssm_cache_dtype", "float32")
    return _Layers(kv, *_attention(keys), ssm, *_mamba2(keys, False, inner), dtype)


def _falcon(keys: _Keys) -> _Layers:
    layers = keys.size("num_hidden_layers")
    expanded = int(keys.get("mamba_expand", 2) * keys.size("hidden_size"))
    inner = keys.size("mamba_d_ssm", default=expanded)
    return _Layers(layers, *_attention(keys), layers, *_mamba2(keys, True, inner))


def _gated_delta_net(keys: _Keys) -> _Layers:
    layers = keys.size("num_hidden_layers")
    if keys.get("layer_types"):
        kv, ssm = _listed(keys, "layer_types")
    else:
        kv = layers // keys.size("full_attention_interval", default=4)
        ssm = layers - kv
    k_heads, v_heads = keys.size("linear_num_key_heads"), keys.size("linear_num_value_heads")
    k_size, v_size = keys.size("linear_key_head_dim"), keys.size("linear_value_head_dim")
    channels = 2 * k_heads * k_size + v_heads * v_size
    conv = (keys.size("linear_conv_kernel_dim", default=4) - 1, channels)
    dtype = keys.get("mamba_ssm_dtype")
    return _Layers(kv, *_attention(keys), ssm, conv, (v_heads, v_size, k_size), dtype)


def _kimi_linear(keys: _Keys) -> _Layers:
    linear = _Keys(f"{keys.name}: linear_attn_config", keys.one_of("linear_attn_config"))
    kv, ssm = len(linear.one_of("full_attn_layers")), len(linear.one_of("kda_layers"))
    heads, size = linear.size("num_heads"), linear.size("head_dim")
    conv = (linear.size("short_conv_kernel_size", default=4) - 1, 3 * heads * size)
    latent = keys.size("kv_lora_rank") + keys.size("qk_rope_head_dim")
    return _Layers(kv, 1, latent, ssm, conv, (heads, size, size), "float32", latent=True)


class Family(NamedTuple):
    """How to read a ``model_type``, and where that reading comes from."""

    read: Callable[[_Keys], _Layers]
    source: str


_VLLM = "vLLM 0.32, get_mamba_state_shape_from_config of "
FAMILIES: dict[str, Family] = {
    "jamba": Family(_jamba, _VLLM + "models/jamba.py (Mamba-1)"),
    "granitemoehybrid": Family(_granite, _VLLM + "models/granitemoehybrid.py (Mamba-2)"),
    "nemotron_h": Family(_nemotron, _VLLM + "models/nemotron_h.py (Mamba-2; states fp32)"),
    "falcon_h1": Family(_falcon, _VLLM + "models/falcon_h1.py (Mamba-2 beside attention)"),
    "qwen3_next": Family(_gated_delta_net, _VLLM + "models/qwen3_next.py (gated delta net)"),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
        Family(_gated_delta_net, _VLLM + "models/qwen3_5.py (gated delta net)"),
    ),
    "kimi_linear": Family(
        _kimi_linear, "vLLM 0.32, kda_state_shape and kda_state_dtype (KDA, states fp32; MLA)"
    ),
}


def shape_of(config: Mapping[str, Any], name: str = "config") -> ModelShape:
    """Read a configuration.

    Args:
        config: The parsed ``config.json``.
        name: For error messages.

    Raises:
        ShapeError: Unknown model type, missing or senseless key; names it.
    """
    notes = config.get(NOTES, {})
    model_type = config.get("model_type")
    values = {**config, **config.get("text_config", {})}
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ShapeError(
            f"{name}: unknown model_type {model_type!r}{hint}; known: {', '.join(FAMILIES)}"
        )
    keys = _Keys(name, values)
    layers = FAMILIES[model_type].read(keys)
    if not layers.kv_layers or not layers.ssm_layers:
        kind = "attention" if not layers.kv_layers else "SSM"
        raise ShapeError(f"{name}: no {kind} layers; only models that mix both kinds are planned")
    dtype = keys.one_of("dtype", "torch_dtype", default="bfloat16")
    dtype_bytes(dtype)
    return ModelShape(
        name=name,
        model_type=model_type,
        kv_layers=layers.kv_layers,
        kv_heads=layers.kv_heads,
        token_elements=layers.token_elements,
        latent=layers.latent,
        ssm_layers=layers.ssm_layers,
        conv_shape=layers.conv_shape,
        state_shape=layers.state_shape,
        dtype=dtype,
        state_dtype=layers.state_dtype or dtype,
        max_model_len=keys.size("max_position_embeddings", "model_max_length", default=131072),
        parameters=notes.get("parameters"),
        active_parameters=notes.get("active_parameters"),
        source=notes.get("source", ""),
        assumed=tuple(notes.get("assumed", ())),
    )


def find_config(model: str) -> Path:
    """Path of a model's configuration: a file, a folder, or a name on the hub.

    Raises:
        ShapeError: There is none, or the hub cannot be reached.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return path
    if path.suffix == ".json" or model.startswith((".", "/")) or model.count("/") != 1:
        raise ShapeError(f"{model}: no such configuration file or model folder")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:
        raise ShapeError(
            f"{model}: no such file or folder, and the hub gave none "
            f"({type(error).__name__}); give the path of a config.json"
        ) from None


def read_shape(model: str) -> ModelShape:
    """Read a model's shape from a file, a folder, or the hub.

    Raises:
        ShapeError: Naming the file, the line or the key.
    """
    path = find_config(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ShapeError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ShapeError(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ShapeError(f"{path}: is no JSON object")
    # A name on the hub says more than the place where the client keeps its file.
    return shape_of(config, str(path) if Path(model).exists() else model)
