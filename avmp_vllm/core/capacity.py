"""How much fits into the same bytes: stock vLLM's rule, a static split, an arena, and the limit.

Plain arithmetic, which the running engine's start-up log and ``avmp plan`` share.
"""

from __future__ import annotations

from dataclasses import dataclass

from avmp_vllm.core.geometry import Geometry, KVLayer, PageGroup, SSMLayer, ceil_div
from avmp_vllm.core.handles import Kind

#: An SSM layer's state starts on this boundary inside its block (bytes); covers every dtype.
STATE_ALIGNMENT = 16


def stock_block_tokens(page_tokens: int, page_bytes: int, state_bytes: int, unit: int) -> int:
    """The attention block that stock vLLM inflates until its page covers one layer's state.

    Args:
        page_tokens: Tokens of one layer's KV page of ``page_bytes``.
        page_bytes: Bytes of that page.
        state_bytes: Bytes of one layer's state.
        unit: Tokens that the block must be a multiple of: vLLM's default block, or the user's.
    """
    token_bytes = page_bytes // page_tokens
    return unit * ceil_div(state_bytes, unit * token_bytes)


@dataclass(frozen=True)
class StockPlan:
    """What stock vLLM makes of the same layers and bytes.

    Attributes:
        groups: Block tables of attention layers, with the tokens of their inflated blocks.
        ssm_groups: Block tables of SSM layers.
        states: Blocks that a request holds in each SSM group.
        blocks: Usable blocks of its one pool: all but the null block.
    """

    groups: tuple[PageGroup, ...]
    ssm_groups: int
    states: int
    blocks: int

    @property
    def block_tokens(self) -> int:
        """Tokens of an attention block."""
        return self.groups[0].page_tokens

    @property
    def tables(self) -> int:
        """Block tables in all."""
        return len(self.groups) + self.ssm_groups

    def blocks_of(self, tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds."""
        pages = sum(group.pages_for(tokens) for group in self.groups)
        return pages + self.ssm_groups * self.states

    def sequences(self, tokens: int) -> int:
        """Sequences of so many tokens that fit together."""
        return self.blocks // self.blocks_of(tokens)

    def logged_tokens(self, max_model_len: int) -> int:
        """The figure of vLLM's "KV cache size" line, which counts the null block too."""
        return int((self.blocks + 1) / self.blocks_of(max_model_len) * max_model_len)


def stock_groups(kv_layers: int, ssm_layers: int) -> tuple[int, int, int]:
    """Split layers as vLLM's ``_get_kv_cache_groups_uniform_page_size`` does.

    Returns:
        Layers of a group, groups of attention layers, groups of SSM layers.
    """
    few, many = sorted((kv_layers, ssm_layers))
    size = many if many < few * 1.5 else few
    return size, ceil_div(kv_layers, size), ceil_div(ssm_layers, size)


@dataclass(frozen=True)
class Layers:
    """One rank's layers, all of a kind alike.

    Attributes:
        kv_layers: Full-attention layers.
        token_bytes: Bytes of one token in one of them.
        ssm_layers: SSM layers.
        state_bytes: Bytes of one sequence's state in one of them.
    """

    kv_layers: int
    token_bytes: int
    ssm_layers: int
    state_bytes: int

    def geometry(self, arena_bytes: int, page_tokens: int) -> Geometry:
        """Geometry of an arena over these layers."""
        state = ceil_div(self.state_bytes, STATE_ALIGNMENT) * STATE_ALIGNMENT
        return Geometry.from_layers(
            arena_bytes,
            [KVLayer(self.token_bytes)] * self.kv_layers,
            [SSMLayer(state)] * self.ssm_layers,
            page_tokens,
        )

    def stock(self, arena_bytes: int, unit: int, states: int) -> StockPlan:
        """Plan stock vLLM.

        Args:
            arena_bytes: Bytes for all blocks.
            unit: Tokens that its block must be a multiple of.
            states: Blocks that a request holds in each SSM group.
        """
        block = stock_block_tokens(1, self.token_bytes, self.state_bytes, unit)
        size, kv, ssm = stock_groups(self.kv_layers, self.ssm_layers)
        blocks = arena_bytes // (size * block * self.token_bytes)
        return StockPlan((PageGroup(block),) * kv, ssm, states, max(blocks - 1, 0))

    def sequence_bytes(self, tokens: int, states: int) -> int:
        """Bytes of a sequence with neither pages nor padding."""
        kv = tokens * self.kv_layers * self.token_bytes
        return kv + states * self.ssm_layers * self.state_bytes


@dataclass(frozen=True)
class StaticSplit:
    """Two pools of exact page sizes whose split never changes.

    Attributes:
        geometry: Page sizes, and the bytes in all.
        ratio: State bytes to KV bytes, as SGLang's ``--mamba-full-memory-ratio`` reads.
    """

    geometry: Geometry
    ratio: float

    @property
    def blocks(self) -> int:
        """Usable SSM blocks; the null bytes are taken off first, as from an arena."""
        geometry = self.geometry
        null = geometry.null_blocks * geometry.block_bytes
        usable = geometry.pages * geometry.page_bytes - null
        return int(usable * self.ratio / (1 + self.ratio)) // geometry.block_bytes

    @property
    def pages(self) -> int:
        """Usable KV pages: what the SSM blocks leave."""
        geometry = self.geometry
        below = (geometry.null_blocks + self.blocks) * geometry.block_bytes
        return geometry.pages - ceil_div(below, geometry.page_bytes)

    def sequences(self, tokens: int, states: int) -> int:
        """Sequences of so many tokens that fit together."""
        return min(self.pages // self.geometry.pages_for(tokens), self.blocks // states)

    def binding(self, tokens: int, states: int) -> Kind:
        """The pool that runs dry first."""
        pages = self.pages // self.geometry.pages_for(tokens)
        return Kind.KV if pages < self.blocks // states else Kind.SSM


def binding_pool(geometry: Geometry, tokens: int, states: int) -> Kind:
    """The kind of page that takes the larger part of a sequence's bytes."""
    pages = geometry.pages_for(tokens) * geometry.page_bytes
    return Kind.KV if pages > states * geometry.block_bytes else Kind.SSM
