"""What speculative decoding adds to what a model keeps: vLLM's own option, read without vLLM.

A sequence holds a state more for each token that is drafted for it, a convolution keeps as many
inputs more, and a drafter with attention has layers of its own in every KV page.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from avmp_vllm.core.tables import Role
from avmp_vllm.models.layers import Keys, LayerShape, ShapeError, attention
from avmp_vllm.models.shapes import ModelShape, read_config

OPTION = "--speculative-config"
#: Drafters that AVMP serves; a test compares them with the engine's.
METHODS = ("ngram", "mtp", "eagle", "eagle3")


@dataclass(frozen=True)
class Drafts:
    """How tokens are drafted.

    Attributes:
        tokens: Drafted in a step for each sequence.
        method: One of ``METHODS``.
        model: Configuration file, model folder or hub name of a drafter with weights of its own.
    """

    tokens: int
    method: str
    model: str | None = None

    @classmethod
    def read(cls, text: str) -> Drafts:
        """Read the value of vLLM's option; keys that touch no cache are passed over.

        Raises:
            ShapeError: Not JSON, or a key is missing or has no sense; names it.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ShapeError(f"{OPTION} {text}: is not JSON: {error.msg}") from None
        if not isinstance(values, dict):
            raise ShapeError(f"{OPTION} {text}: is no JSON object")
        keys = Keys(OPTION, values)
        method = str(keys.get("method"))
        if method.endswith("_mtp"):  # vLLM's older names
            method = "mtp"
        if method not in METHODS:
            raise ShapeError(f"{OPTION}: method {method!r} is none of {', '.join(METHODS)}")
        model = keys.get("model")
        if method.startswith("eagle") and model is None:
            raise ShapeError(f"{OPTION}: method {method!r} needs the key 'model'")
        if keys.get("num_speculative_tokens") is None:
            raise ShapeError(f"{OPTION}: key 'num_speculative_tokens' is missing")
        return cls(keys.size("num_speculative_tokens"), method, model)

    def beside(self, shape: ModelShape) -> ModelShape:
        """The model with all that a drafting engine keeps.

        Raises:
            ShapeError: Layers that cannot follow drafts, or whose caches are not reckoned.
        """
        for layer in shape.layers:
            if layer.what == "Mamba-1":
                raise ShapeError(
                    f"{OPTION}: {shape.name} has Mamba-1 layers, whose state no kernel of vLLM "
                    "takes back when a draft is rejected; AVMP refuses it"
                )
            if layer.role is Role.RING:
                raise ShapeError(
                    f"{OPTION}: {shape.name} keeps rings of {layer.what}, and how drafts widen "
                    "them is not reckoned; leave it out"
                )
        layers = [layer.with_drafts(self.tokens) for layer in shape.layers]
        for own in self._layers(shape):
            _add(layers, own)
        return replace(shape, layers=tuple(layers))

    def _layers(self, shape: ModelShape) -> list[LayerShape]:
        """Layers of the drafter, if it has any."""
        if self.method == "mtp":
            if not shape.mtp_layers:
                raise ShapeError(
                    f"{OPTION}: {shape.name} names no MTP layers (key 'num_nextn_predict_layers' "
                    "or 'mtp_num_hidden_layers')"
                )
            return [replace(shape.attention, layers=shape.mtp_layers)]
        if self.model is not None and self.method.startswith("eagle"):
            config, name = read_config(self.model)
            keys = Keys(name, config)
            return [attention(keys, keys.size("num_hidden_layers"))]
        return []


def _add(layers: list[LayerShape], own: LayerShape) -> None:
    """Put layers to those that keep the same, or behind those that are held in the same way."""
    for index, layer in enumerate(layers):
        if replace(layer, layers=own.layers, what=own.what) == own:
            layers[index] = replace(layer, layers=layer.layers + own.layers)
            return
    order = list(Role)
    layers.append(own)
    layers.sort(key=lambda layer: order.index(layer.role))
