"""How much fits into the same bytes: stock vLLM's rule, a static split, an arena, and the limit.

Plain arithmetic, which the running engine's start-up log and ``avmp plan`` share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from avmp_vllm.core.geometry import Geometry, PageGroup, ceil_div
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
        block_bytes: Bytes of one block, as wide as the widest group; 0 if not asked for.
    """

    groups: tuple[PageGroup, ...]
    ssm_groups: int
    states: int
    blocks: int
    block_bytes: int = 0

    @property
    def block_tokens(self) -> int:
        """Tokens of an attention block: of the first group with a slot for every token."""
        return next(group.page_tokens for group in self.groups if group.most is None)

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


def group_layers(counts: Sequence[int]) -> tuple[int, list[int]]:
    """Split layouts as vLLM's ``_get_kv_cache_groups_uniform_page_size`` does.

    Args:
        counts: Layers of each layout.

    Returns:
        Layers of a group, and groups of each layout.
    """
    few, many = min(counts), max(counts)
    size = many if many < few * 1.5 else few
    return size, [ceil_div(count, size) for count in counts]


def stock_groups(kv_layers: int, ssm_layers: int) -> tuple[int, int, int]:
    """Layers of a group, groups of attention layers, groups of SSM layers."""
    size, (kv, ssm) = group_layers((kv_layers, ssm_layers))
    return size, kv, ssm


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
        usable = geometry.high_end - geometry.null_end
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
