"""What a model keeps per token and per sequence, read from its ``config.json`` alone.

Neither torch nor vLLM is imported: ``families.py`` has a function for each family, from the
configuration's keys to layers and sizes. Sizes are per rank of a tensor parallel group of one.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from avmp_vllm.core.caches import Cache, Layers
from avmp_vllm.core.tables import Role
from avmp_vllm.models.families import FAMILIES, NESTED
from avmp_vllm.models.layers import (
    CACHE,
    MODEL,
    STATE,
    Keys,
    LayerShape,
    ShapeError,
    dtype_bytes,
)

__all__ = ["ModelShape", "ShapeError", "dtype_bytes", "find_config", "read_shape", "shape_of"]

#: Key under which our own configuration files name their source; other readers ignore it.
NOTES = "avmp"


@dataclass(frozen=True)
class ModelShape:
    """Layers of a hybrid model and what each keeps.

    Attributes:
        name: Where it was read from.
        model_type: Key of ``FAMILIES``.
        layers: By layout, attention first.
        dtype: Of the model, which is also the caches' unless said otherwise.
        state_dtype: Of the recurrent state.
        max_model_len: Positions that the configuration allows.
        parameters: Of the whole model, if the file tells.
        active_parameters: Of them, those that one token passes, if the file tells.
        source: Of the figures, if the file tells.
        assumed: Values that the file's author assumed.
        mtp_layers: Attention layers of its own drafter (multi-token prediction), beside ``layers``.
    """

    name: str
    model_type: str
    layers: tuple[LayerShape, ...]
    dtype: str
    state_dtype: str
    max_model_len: int
    parameters: float | None = None
    active_parameters: float | None = None
    source: str = ""
    assumed: tuple[str, ...] = ()
    mtp_layers: int = 0

    def caches(self, kv_dtype: str = "auto") -> Layers:
        """The layers' caches in bytes, with the attention cache in some type."""
        dtypes = self._dtypes(kv_dtype)
        return Layers(
            tuple(
                Cache(
                    layer.role,
                    layer.layers,
                    layer.entry_bytes(dtypes),
                    layer.entry_tokens,
                    layer.window,
                    layer.latent,
                    layer.replicated,
                )
                for layer in self.layers
            )
        )

    def _dtypes(self, kv_dtype: str = "auto") -> dict[str, str]:
        cache = self.dtype if kv_dtype == "auto" else kv_dtype
        return {CACHE: cache, MODEL: self.dtype, STATE: self.state_dtype}

    def with_state_dtype(self, dtype: str) -> ModelShape:
        """The same model with its recurrent state in another type (``auto``: unchanged)."""
        return self if dtype == "auto" else replace(self, state_dtype=dtype)

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values for a result file."""
        values = asdict(self)
        for layer in values["layers"]:
            layer["role"] = layer["role"].name.lower()
        return values

    @property
    def latent(self) -> bool:
        """Whether attention's cache is a latent one (MLA)."""
        return self.attention.latent

    @property
    def attention(self) -> LayerShape:
        """The layers with a slot for every token, first of their kind."""
        return next(layer for layer in self.layers if layer.role is Role.SLOTS)

    @property
    def is_plain(self) -> bool:
        """Whether there is one layout of attention and one of states."""
        roles = [layer.role for layer in self.layers]
        return sorted(roles, key=list(Role).index) == [Role.SLOTS, Role.STATE]

    def require_plain(self) -> None:
        """Refuse a model that the replays cannot follow.

        Raises:
            ShapeError: Naming what its layers keep.
        """
        if not self.is_plain:
            kinds = ", ".join(layer.what for layer in self.layers)
            raise ShapeError(
                f"{self.name}: its layers keep {kinds}; only models with one layout of attention "
                "and one of states are replayed (`avmp plan` reads all)"
            )

    def _state(self) -> LayerShape:
        self.require_plain()
        return next(layer for layer in self.layers if layer.role is Role.STATE)

    # Of models with one layout of each kind, which the replays take; others are an error there.

    @property
    def kv_layers(self) -> int:
        """Attention layers of a plain model."""
        self.require_plain()
        return self.attention.layers

    @property
    def ssm_layers(self) -> int:
        """SSM layers of a plain model."""
        return self._state().layers

    @property
    def kv_heads(self) -> int:
        """KV heads of an attention layer; 1 with a latent cache."""
        shape = self.attention.parts[0].shape
        return shape[1] if len(shape) == 3 else 1

    @property
    def token_elements(self) -> int:
        """Cached elements of one token in one attention layer, keys and values."""
        return prod(self.attention.parts[0].shape)

    def token_bytes(self, kv_dtype: str = "auto") -> int:
        """Bytes of one token in one attention layer."""
        return self.attention.entry_bytes(self._dtypes(kv_dtype))

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's state in one SSM layer of a plain model."""
        return self._state().entry_bytes(self._dtypes())

    @property
    def state_parts(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape and type of each array of a plain model's state."""
        dtypes = self._dtypes()
        return tuple(
            (part.shape, dtypes.get(part.dtype, part.dtype)) for part in self._state().parts
        )


def shape_of(config: Mapping[str, Any], name: str = "config") -> ModelShape:
    """Read a configuration.

    Args:
        config: The parsed ``config.json``.
        name: For error messages.

    Raises:
        ShapeError: Unknown model type, missing or senseless key; names it.
    """
    notes = config.get(NOTES, {})
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), dict)), {})
    values = {**config, **nested}
    model_type = config.get("model_type")
    if nested.get("model_type") in FAMILIES:
        model_type = nested["model_type"]
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ShapeError(
            f"{name}: unknown model_type {model_type!r}{hint}; known: {', '.join(FAMILIES)}"
        )
    keys = Keys(name, {**values, "model_type": model_type})
    read = FAMILIES[model_type].read(keys)
    order = list(Role)
    layers = tuple(
        layer
        for layer in sorted(read.layers, key=lambda layer: order.index(layer.role))
        if layer.layers
    )
    for role, kind in ((Role.SLOTS, "attention"), (Role.STATE, "SSM")):
        if all(layer.role is not role for layer in layers):
            raise ShapeError(
                f"{name}: no {kind} layers; only models that mix both kinds are planned"
            )
    dtype = keys.one_of("dtype", "torch_dtype", default="bfloat16")
    dtype_bytes(dtype)
    return ModelShape(
        name=name,
        model_type=model_type,
        layers=layers,
        dtype=dtype,
        state_dtype=read.state_dtype or dtype,
        max_model_len=keys.size("max_position_embeddings", "model_max_length", default=131072),
        parameters=notes.get("parameters"),
        active_parameters=notes.get("active_parameters"),
        source=notes.get("source", ""),
        assumed=tuple(notes.get("assumed", ())),
        mtp_layers=_mtp_layers(keys),
    )


def _mtp_layers(keys: Keys) -> int:
    """Attention layers of a drafter that comes with the model; Nemotron-H's has others beside."""
    steps = keys.size("mtp_num_hidden_layers", "num_nextn_predict_layers", default=0, least=0)
    return steps * keys.get("mtp_hybrid_override_pattern", "*").count("*")


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


def read_config(model: str) -> tuple[dict[str, Any], str]:
    """Read a model's configuration from a file, a folder, or the hub.

    Returns:
        Its keys, and what to call it in messages.

    Raises:
        ShapeError: Naming the file and the line.
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
    return config, str(path) if Path(model).exists() else model


def read_shape(model: str) -> ModelShape:
    """Read a model's shape from a file, a folder, or the hub.

    Raises:
        ShapeError: Naming the file, the line or the key.
    """
    return shape_of(*read_config(model))
