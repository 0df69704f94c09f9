"""The two model shapes of the paper: sizes in bytes of one layer's KV page and SSM state.

Source: arXiv 2605.22416 and its code (`jamba_1_5_mini`; `mamba2_1b3`, a made-up shape with a state
eight times as large). Convolution states are left out, as the paper leaves them out.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Tokens of a KV page.
PAGE_TOKENS = 16

_KV_HEADS, _HEAD_DIM, _BF16 = 8, 128, 2


@dataclass(frozen=True)
class Model:
    """One hybrid model's shape.

    Args:
        name: As in the published tables.
        inner: Width of an SSM layer (``d_inner``).
        state: State size of an SSM layer (``d_state``).
        kv_layers: Full-attention layers.
        ssm_layers: SSM layers.
    """

    name: str
    inner: int
    state: int
    kv_layers: int = 4
    ssm_layers: int = 28

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of 16 tokens' keys and values in one attention layer."""
        return 2 * _KV_HEADS * _HEAD_DIM * _BF16 * PAGE_TOKENS

    @property
    def layer_state_bytes(self) -> int:
        """Bytes of one sequence's state in one SSM layer."""
        return self.inner * self.state * _BF16

    @property
    def page_bytes(self) -> int:
        """Bytes of 16 tokens over all attention layers."""
        return self.kv_layers * self.layer_page_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all attention layers."""
        return self.page_bytes // PAGE_TOKENS

    @property
    def block_bytes(self) -> int:
        """Bytes of one sequence's states over all SSM layers."""
        return self.ssm_layers * self.layer_state_bytes


MODELS: dict[str, Model] = {
    model.name: model
    for model in (Model("jamba_1_5_mini", 8192, 16), Model("mamba2_1b3", 8192, 128))
}


def pages_for(tokens: int) -> int:
    """KV pages that hold so many tokens."""
    return -(-tokens // PAGE_TOKENS)
