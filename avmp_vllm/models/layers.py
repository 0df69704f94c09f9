"""What layers of a model keep, in elements and types; a configuration's keys, with their errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from avmp_vllm.core.tables import Role

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
#: Types that the model or an option settles: of the attention cache, of the model, of the state.
CACHE, MODEL, STATE = "cache", "model", "state"


class ShapeError(ValueError):
    """A model's configuration that cannot be read; names the file and the key."""


def dtype_bytes(name: str) -> int:
    """Bytes of an element.

    Raises:
        ShapeError: An unknown name, with those that are known.
    """
    if name not in DTYPE_BYTES:
        raise ShapeError(f"unknown dtype {name!r}; known: {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[name]


class Part(NamedTuple):
    """An array that an entry or a state consists of.

    Attributes:
        shape: Its elements.
        dtype: ``CACHE``, ``MODEL``, ``STATE``, or the name of a type.
        drafted: Whether its first dimension grows by the tokens that a step drafts: the last inputs
            of a convolution, which must go back behind a rejected one.
    """

    shape: tuple[int, ...]
    dtype: str
    drafted: bool = False

    def bytes(self, dtypes: Mapping[str, str]) -> int:
        """Its bytes, with the types that are settled elsewhere."""
        return prod(self.shape) * dtype_bytes(dtypes.get(self.dtype, self.dtype))


@dataclass(frozen=True)
class LayerShape:
    """Layers that keep the same.

    Attributes:
        what: Their kind, for people.
        role: What a request holds of each.
        layers: How many.
        parts: Of an entry, or of the state.
        entry_tokens: Tokens that an entry covers.
        window: Tokens of a sliding window, or entries of a ring.
        latent: An MLA cache.
        replicated: A state that every tensor parallel rank keeps whole.
    """

    what: str
    role: Role
    layers: int
    parts: tuple[Part, ...]
    entry_tokens: int = 1
    window: int | None = None
    latent: bool = False
    replicated: bool = False

    def entry_bytes(self, dtypes: Mapping[str, str]) -> int:
        """Bytes of one layer's entry or state."""
        return sum(part.bytes(dtypes) for part in self.parts)

    def with_drafts(self, tokens: int) -> LayerShape:
        """The same where each step drafts so many tokens."""
        parts = (
            part._replace(shape=(part.shape[0] + tokens, *part.shape[1:])) if part.drafted else part
            for part in self.parts
        )
        return replace(self, parts=tuple(parts))


class Keys:
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

    def size(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, positive unless ``least`` allows zero."""
        value = self.one_of(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ShapeError(
                f"{self.name}: key {keys[0]!r} must be a positive integer, not {value!r}"
            )
        return value

    def but(self, changes: Mapping[str, Any]) -> Keys:
        """The same with other values of some keys, as one layer may have."""
        return Keys(self.name, {**self.values, **changes})


def attention(keys: Keys, layers: int, head_size: int | None = None) -> LayerShape:
    """Full attention, or a sliding window: keys and values of every head.

    Args:
        keys: Of the model, or of the layers.
        layers: How many.
        head_size: Channels of a head where the key ``head_dim`` does not tell.
    """
    hidden, count = keys.size("hidden_size"), keys.size("num_attention_heads")
    heads = keys.size("num_key_value_heads", default=count)
    size = head_size or keys.size("head_dim", default=hidden // count)
    window = keys.get("sliding_window")
    role = Role.SLOTS if window is None else Role.WINDOW
    what = "attention" if window is None else f"attention over {window:,} tokens"
    return LayerShape(what, role, layers, (Part((2, heads, size), CACHE),), window=window)


def latent_attention(keys: Keys, layers: int) -> LayerShape:
    """MLA: one latent vector and what is rotated."""
    elements = keys.size("kv_lora_rank") + keys.size("qk_rope_head_dim", default=0, least=0)
    return LayerShape("MLA", Role.SLOTS, layers, (Part((elements,), CACHE),), latent=True)


def states(
    what: str, layers: int, conv: Sequence[int], state: Sequence[int], dtype: str = STATE
) -> LayerShape:
    """Layers with a convolution's last positions and a recurrent state."""
    parts = (Part(tuple(conv), MODEL, drafted=True), Part(tuple(state), dtype))
    return LayerShape(what, Role.STATE, layers, parts)


def convolution(layers: int, shape: Sequence[int], replicated: bool = False) -> LayerShape:
    """Layers with the last positions of a short convolution alone."""
    part = Part(tuple(shape), MODEL, drafted=True)
    return LayerShape("short convolution", Role.STATE, layers, (part,), replicated=replicated)


def one_state(what: str, layers: int, shape: Sequence[int]) -> LayerShape:
    """Layers with one array of the model's type."""
    return LayerShape(what, Role.STATE, layers, (Part(tuple(shape), MODEL),))
