"""A made-up Jamba whose layers differ: three layouts of keys and values, three of states, windows.

No model that vLLM registers has all of it. Layers, loading and kernels are Jamba's own; each layer
is built from a config of its own, in transformers, which writes the checkpoint, and in vLLM.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from transformers.models.jamba import modeling_jamba
from vllm.model_executor.models import jamba

from avmp_vllm.models.tiny_jamba import write_tiny_jamba

#: Attention is in the odd layers, Mamba in the even ones.
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 1,
}
_KV = {1: {"num_key_value_heads": 1}, 5: {"num_attention_heads": 2, "num_key_value_heads": 2}}
_STATES = {2: {"mamba_d_state": 8}, 4: {"mamba_expand": 1}}
#: What differs, by layer. The window is of the third layout of keys and values, with others.
MODELS: dict[str, dict[int, dict[str, Any]]] = {
    "kv": _KV,
    "states": _STATES,
    "window": {7: {"window": 48}},
    "mixed": {**_KV, **_STATES, 7: {"window": 48}},
}


def write(path: str | Path, name: str, *, layers: int = 8) -> Path:
    """Write the checkpoint of one of ``MODELS``, cut to so many layers."""
    differences = {str(layer): fields for layer, fields in MODELS[name].items()}
    with contextlib.ExitStack() as stack:
        for part in ("JambaAttention", "JambaMambaMixer"):
            varied = _varied(getattr(modeling_jamba, part))
            stack.enter_context(mock.patch.object(modeling_jamba, part, varied))
        return write_tiny_jamba(path, num_hidden_layers=layers, differences=differences, **_SHAPE)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Have engines that start here build Jambas whose layers differ where the config says so."""
    kinds = jamba.ALL_DECODER_LAYER_TYPES
    varied = {kind: partial(_layer, kind_of_layer) for kind, kind_of_layer in kinds.items()}
    with mock.patch.dict(kinds, varied):
        yield


def _own(config: Any, index: int) -> Any:
    """The config of a layer."""
    own = copy.copy(config)
    for name, value in config.differences.get(str(index), {}).items():
        setattr(own, name, value)
    return own


def _varied(part: type) -> type:
    """A part of transformers' Jamba that is built from the config of its layer."""

    def init(self: Any, config: Any, layer_idx: int) -> None:
        part.__init__(self, _own(config, layer_idx), layer_idx)

    return type(part.__name__, (part,), {"__init__": init})


def _layer(make: Callable[..., Any], config: Any, index: int, *args: Any, **kwargs: Any) -> Any:
    """A layer of vLLM's Jamba that is built from its own config."""
    own = _own(config, index)
    window = getattr(own, "window", None)
    attention = partial(jamba.Attention, per_layer_sliding_window=window)
    with mock.patch.object(jamba, "Attention", attention):
        return make(own, index, *args, **kwargs)
