"""What a model's layers keep, by numbers alone, and the arena that holds it.

The engine reads the same from the cache specs of vLLM's layers (``engine/layout``); both sort
layers into tables and place them by ``tables.py``.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from math import lcm

from avmp_vllm.core.capacity import STATE_ALIGNMENT
from avmp_vllm.core.geometry import Geometry, PageGroup, ceil_div
from avmp_vllm.core.tables import (
    Layout,
    Role,
    Table,
    arena_geometry,
    by_need,
    even_parts,
    round_up,
)


@dataclass(frozen=True)
class Cache:
    """Layers that keep the same.

    Attributes:
        role: What a request holds of each.
        layers: How many.
        entry_bytes: Bytes of one layer's entry, or of its state.
        entry_tokens: Tokens that an entry covers; more than one if they are compressed into it.
        window: Tokens that a window sees, or entries of a ring.
        latent: An MLA cache, whose pages stock vLLM does not pad.
        replicated: A state that every tensor parallel rank keeps whole; stock vLLM has a group of
            its own for those.
    """

    role: Role
    layers: int
    entry_bytes: int
    entry_tokens: int = 1
    window: int | None = None
    latent: bool = False
    replicated: bool = False

    def page_tokens(self, tokens: int) -> int:
        """Tokens of its page where other pages have so many: a ring has its own."""
        return self.window or tokens if self.role is Role.RING else tokens

    def page_bytes(self, tokens: int) -> int:
        """Bytes of one layer in a page of so many tokens, or of its state."""
        if self.role is Role.STATE:
            return self.entry_bytes
        return self.page_tokens(tokens) // self.entry_tokens * self.entry_bytes

    def most_pages(self, tokens: int, load: Load) -> int | None:
        """Most pages of so many tokens that a request holds; None without such a bound.

        For windows: vLLM's ``SlidingWindowSpec.max_admission_blocks_per_request``.
        """
        if self.role is Role.RING:
            return 1
        if self.role is Role.WINDOW:
            assert self.window is not None
            held = min(self.window - 1 + load.step_tokens, load.max_model_len)
            return ceil_div(held, tokens) + 1
        return None

    def sequence_bytes(self, tokens: int, states: int) -> int:
        """Bytes of a sequence in all of its layers, with neither pages nor padding."""
        if self.role is Role.STATE:
            entries = states
        elif self.role is Role.RING:
            entries = self.page_tokens(tokens)
        else:
            seen = tokens if self.window is None else min(tokens, self.window)
            entries = ceil_div(seen, self.entry_tokens)
        return self.layers * self.entry_bytes * entries


@dataclass(frozen=True)
class Load:
    """What bounds the pages that a request holds of a window.

    Attributes:
        step_tokens: Tokens that may be scheduled but not yet settled.
        max_model_len: Of the longest request.
    """

    step_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Layers:
    """One rank's layers.

    Attributes:
        caches: Of each layout; the first with a slot for every token is the model's attention.
    """

    caches: tuple[Cache, ...]

    def of(self, *roles: Role) -> list[Cache]:
        """Those of some roles."""
        return [cache for cache in self.caches if cache.role in roles]

    @property
    def attention(self) -> Cache:
        """The model's attention."""
        return self.of(Role.SLOTS)[0]

    @property
    def states(self) -> list[Cache]:
        """Layouts of states."""
        return self.of(Role.STATE)

    @property
    def state_bytes(self) -> int:
        """Bytes of one sequence's states in all layers, without alignment."""
        return sum(cache.layers * cache.entry_bytes for cache in self.states)

    def whole_tokens(self) -> int:
        """What the tokens of a page must be a multiple of, whatever the backend."""
        entries = (cache.entry_tokens for cache in self.caches)
        return lcm(*entries, *(cache.page_tokens(1) for cache in self.of(Role.RING)))

    def tables(self, page_tokens: int, load: Load) -> list[Table]:
        """The block tables of KV pages, the first with a slot for every token."""

        def need(cache: Cache) -> Hashable:
            return cache.page_tokens(page_tokens), cache.window

        paged = self.of(Role.SLOTS, Role.WINDOW, Role.RING)
        tables = [
            Table(
                tuple(Layout(cache.page_bytes(page_tokens), cache.layers) for cache in members),
                PageGroup(
                    members[0].page_tokens(page_tokens), members[0].most_pages(page_tokens, load)
                ),
                role,
            )
            for role, members in by_need((cache.role, need(cache), cache) for cache in paged)
        ]
        numbers = even_parts(tables)
        return [
            part
            for table, number in zip(tables, numbers, strict=True)
            for part in table.parts(number)
        ]

    def geometry(
        self, arena_bytes: int, page_tokens: int, load: Load, alignment: int = 1
    ) -> Geometry:
        """Geometry of an arena over these layers.

        Args:
            arena_bytes: Bytes of the arena.
            page_tokens: Tokens of a page.
            load: Bounds the pages of windows.
            alignment: What the bytes of a page must be a multiple of besides.

        Raises:
            ArenaTooSmall: Not even one page of each kind.
        """
        states = [
            Layout(round_up(cache.entry_bytes, STATE_ALIGNMENT), cache.layers)
            for cache in self.states
        ]
        return arena_geometry(arena_bytes, self.tables(page_tokens, load), states, alignment)

    def sequence_bytes(self, tokens: int, states: int) -> int:
        """Bytes of a sequence with neither pages nor padding."""
        return sum(cache.sequence_bytes(tokens, states) for cache in self.caches)
