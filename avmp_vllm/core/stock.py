"""Stock vLLM's plan for layers of several layouts, by numbers alone.

What the planning functions of vLLM 0.32 do (``v1/core/kv_cache_utils.py``), for the caches that
hybrid models have. The engine asks those functions themselves (``engine/layout/capacity.py``), and
a test compares the two over all families.

- The attention block grows until its page covers the largest state; states are padded to it
  (``Platform._align_hybrid_block_size``).
- Pages of one size: every layout's layers are split into groups of equally many
  (``_get_kv_cache_groups_uniform_page_size``).
- Compressed caches and rings lie side by side within a block, and a block is as wide as its widest
  group (``_get_packed_kv_cache_groups``).
- Other mixtures get one page size, by larger blocks or by padding
  (``unify_kv_cache_spec_page_size``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from avmp_vllm.core.caches import Cache, Layers, Load
from avmp_vllm.core.capacity import StockPlan, group_layers, stock_block_tokens
from avmp_vllm.core.geometry import PageGroup, ceil_div
from avmp_vllm.core.tables import Role, by_need, round_up


@dataclass(frozen=True)
class StockRules:
    """What the backends ask of stock vLLM's block.

    Attributes:
        unit: Tokens that the block is chosen in multiples of.
        multiple: Tokens that it must be a multiple of besides, for every backend's kernels.
        alignment: What the bytes of a block must be a multiple of where pages lie side by side.
    """

    unit: int
    multiple: int = 1
    alignment: int = 1


@dataclass(frozen=True)
class _Sized:
    """A layout under stock vLLM's block: tokens and bytes of one layer's page."""

    cache: Cache
    tokens: int
    page: int


@dataclass(frozen=True)
class _Bucket:
    """Layers that may share a group where pages lie side by side."""

    role: Role
    group: PageGroup
    pages: Counter[int]

    @property
    def layers(self) -> int:
        return self.pages.total()

    @property
    def repeats(self) -> int:
        """Most layers of one page size."""
        return max(self.pages.values())

    @property
    def balanced(self) -> bool:
        """Whether there are as many layers of each page size."""
        return len(set(self.pages.values())) == 1

    def width(self, groups: int) -> int:
        """Bytes of the widest of so many groups."""
        return sum(ceil_div(count, groups) * page for page, count in self.pages.items())


def plan_stock(
    layers: Layers, arena_bytes: int, rules: StockRules, states: int, load: Load
) -> StockPlan | None:
    """Plan stock vLLM; None for layers that it cannot plan.

    Args:
        layers: Of one rank.
        arena_bytes: Bytes for all blocks.
        rules: Of the backends.
        states: Blocks that a request holds in each group of states.
        load: Bounds the pages of windows.
    """
    attention = layers.attention
    largest = max(cache.entry_bytes for cache in layers.states)
    block = stock_block_tokens(1, attention.entry_bytes, largest, rules.unit)
    block = round_up(block, rules.multiple)
    padded = attention.page_bytes(block)
    sized = [
        _Sized(cache, block, padded)
        if cache.role is Role.STATE
        else _Sized(cache, cache.page_tokens(block), cache.page_bytes(block))
        for cache in layers.caches
    ]
    if len({one.page for one in sized}) == 1:
        return _plan_uniform(sized, arena_bytes, states, load)
    if any(one.cache.role is Role.RING or one.cache.entry_tokens > 1 for one in sized):
        return _plan_packed(sized, arena_bytes, rules.alignment, states, load)
    unified = _unify(sized)
    return None if unified is None else _plan_uniform(unified, arena_bytes, states, load)


def _unify(sized: Sequence[_Sized]) -> list[_Sized] | None:
    """Give all layouts one page size; None where a latent cache would have to be padded."""
    largest = max(one.page for one in sized)
    unified = []
    for one in sized:
        ratio, rest = divmod(largest, one.page)
        tokens = one.tokens
        if not rest and one.cache.role is not Role.STATE:
            tokens *= ratio
        elif rest and one.cache.latent:
            return None
        unified.append(_Sized(one.cache, tokens, largest))
    return unified


def _group(one: _Sized, load: Load) -> PageGroup:
    return PageGroup(one.tokens, one.cache.most_pages(one.tokens, load))


def _plan_uniform(sized: Sequence[_Sized], arena_bytes: int, states: int, load: Load) -> StockPlan:
    """Groups of equally many layers, each of one layout."""
    size, numbers = group_layers([one.cache.layers for one in sized])
    groups: list[PageGroup] = []
    of_states = 0
    for one, number in zip(sized, numbers, strict=True):
        if one.cache.role is Role.STATE:
            of_states += number
        else:
            groups += [_group(one, load)] * number
    width = size * sized[0].page
    blocks = max(arena_bytes // width - 1, 0)
    return StockPlan(tuple(groups), of_states, states, blocks, width)


def _plan_packed(
    sized: Sequence[_Sized], arena_bytes: int, alignment: int, states: int, load: Load
) -> StockPlan:
    """Groups of several layouts side by side; what is kept once a request is split to fit."""
    buckets = _buckets(sized, load)
    mixed = [bucket.repeats for bucket in buckets if bucket.balanced and len(bucket.pages) > 1]
    repeats = None
    if mixed:
        even = [bucket.repeats for bucket in buckets if bucket.balanced]
        repeats = _least_padding(even, max(mixed))

    def number_of(bucket: _Bucket) -> int:
        if bucket.balanced and repeats is not None:
            return ceil_div(bucket.repeats, repeats)
        return 1

    def may_shrink(bucket: _Bucket) -> bool:
        if bucket.role is Role.WINDOW:
            return repeats is None
        return bucket.role is not Role.SLOTS

    anchor = max(
        bucket.width(bucket.layers if may_shrink(bucket) else number_of(bucket))
        for bucket in buckets
    )
    groups: list[PageGroup] = []
    of_states = widest = 0
    for bucket in buckets:
        number = number_of(bucket)
        if may_shrink(bucket):
            fit = max(anchor // next(iter(bucket.pages)), 1)
            number = max(number, ceil_div(bucket.layers, fit))
        widest = max(widest, bucket.width(number))
        if bucket.role is Role.STATE:
            of_states += number
        else:
            groups += [bucket.group] * number
    width = round_up(widest, alignment)
    blocks = max(arena_bytes // width - 1, 0)
    return StockPlan(tuple(groups), of_states, states, blocks, width)


def _buckets(sized: Sequence[_Sized], load: Load) -> list[_Bucket]:
    """Layouts that need the same slots."""
    found = by_need(
        (one.cache.role, (one.tokens, one.cache.window, one.cache.replicated), one) for one in sized
    )
    buckets = []
    for role, members in found:
        pages: Counter[int] = Counter()
        for one in members:
            pages[one.page] += one.cache.layers
        buckets.append(_Bucket(role, _group(members[0], load), pages))
    return buckets


def _least_padding(counts: Sequence[int], least: int) -> int:
    """The group size, at least so large, that pads so many layers least; the largest such."""
    sizes = range(least, max(counts) + 1)
    return min(sizes, key=lambda size: (sum(-count % size for count in counts), -size))
