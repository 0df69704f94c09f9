"""What running requests will still need: pages to keep free when another one is admitted.

Each running request is one slot. At ``t`` tokens from now it still runs with probability
``p(t) = S(g + t) / S(g)`` and then holds ``pages(tokens + t) + state``; if it has ended it holds
nothing but what others hold with it. With independent answers the pages held then have

    mean(t) = sum p(t) * need(t)        var(t) = sum p(t) * (1 - p(t)) * need(t)**2

and the reserve is the largest of ``mean(t) + risk * sqrt(var(t)) - held now`` over the window. No
more than all of them can need counts: with a handful of requests, each a large part of memory, the
spread of who ends is wider than what anybody can still take.

A state counts as its bytes in pages. Slots are rows of a few arrays, so that reckoning takes a
dozen array operations and no loop over the requests.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from avmp_vllm.predict.bins import Floats, LengthBins
from avmp_vllm.predict.forecaster import Forecast

#: Tokens to look ahead at most. By then most of those that run now have ended.
WINDOW = 1024
#: Each horizon looked at is so many times the one before it, or one page more.
GROWTH = 1.6


def pages_ahead(page_tokens: int, window: int) -> list[int]:
    """Pages of growth at which the need is reckoned: none, one, two, then ever further apart.

    Nothing inside of the first page: what is short there is short by a page or two until the next
    answer ends, and costs one preemption at most. Keeping room for that, too, was tried, and lost
    more than it spared.

    Args:
        page_tokens: Tokens of a page.
        window: Tokens to look ahead; the last of the pages is the one that they end in.
    """
    last = -(-window // page_tokens)
    found, pages = [0], 1
    while pages < last:
        found.append(pages)
        pages = max(int(pages * GROWTH), pages + 1)
    return [*found, last] if last else found


class RunningSet:
    """The running requests, and what they will need.

    Args:
        bins: Of the forecasts.
        page_tokens: Tokens of a page.
        state_pages: Bytes of a request's states, in pages.
        window: Furthest horizon in tokens.
    """

    def __init__(
        self, bins: LengthBins, page_tokens: int, state_pages: float, window: int = WINDOW
    ) -> None:
        if page_tokens < 1 or state_pages < 0 or window < 0:
            raise ValueError(f"{page_tokens} tokens, {state_pages} pages, window {window}")
        self._bins = bins
        self._widths: Floats = bins.edges[1:] - bins.edges[:-1]
        self._page = page_tokens
        self._state = state_pages
        ahead = np.array(pages_ahead(page_tokens, window), dtype=np.int64)
        self._ahead_pages: Floats = ahead.astype(np.float64)
        self._ahead: NDArray[np.int64] = ahead * page_tokens
        self._coming: dict[Hashable, int] = {}  # name -> tokens that have no pages yet
        self._slot_of: dict[Hashable, int] = {}
        self._names: list[Hashable] = []
        self._grow_to(16)

    def _grow_to(self, slots: int) -> None:
        used = len(self._names)
        edges = self._bins.count + 1
        # A curve between two edges is base + slope * length; the last value is for what is longer.
        base, slope = np.zeros((slots, edges)), np.zeros((slots, edges))
        whole = np.zeros((3, slots), dtype=np.int64)
        if used:
            base[:used], slope[:used] = self._base[:used], self._slope[:used]
            whole[:, :used] = self._whole[:, :used]
        self._base: Floats = base
        self._slope: Floats = slope
        # Rows: tokens of the prompt, tokens generated, pages shared with others.
        self._whole: NDArray[np.int64] = whole
        self._offsets: NDArray[np.int64] = np.arange(slots) * edges

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._slot_of

    def add(
        self,
        name: Hashable,
        forecast: Forecast,
        prompt_tokens: int,
        generated: int = 0,
        computed: int | None = None,
        shared_pages: int = 0,
    ) -> None:
        """A request begins to run, or goes on after it was preempted.

        Args:
            name: Its name.
            forecast: Made when it arrived.
            prompt_tokens: Of its prompt.
            generated: Tokens that it has generated before.
            computed: Of its prompt and those, for which pages are allocated; None for all.
            shared_pages: Of its pages that stay when it ends, since others hold them.
        """
        if name in self._slot_of:
            raise ValueError(f"request {name} runs already")
        slot = len(self._names)
        if slot == len(self._base):
            self._grow_to(2 * slot)
        self._slot_of[name] = slot
        self._names.append(name)
        edges, curve = self._bins.edges, forecast.curve
        slope = (curve[1:] - curve[:-1]) / self._widths
        self._slope[slot, :-1] = slope
        self._base[slot, :-1] = curve[:-1] - slope * edges[:-1]
        self._whole[:, slot] = (prompt_tokens, generated, shared_pages)
        if computed is not None:
            self.computed(name, computed)

    def remove(self, name: Hashable) -> None:
        """A request ended or was preempted."""
        slot = self._slot_of.pop(name)
        self._coming.pop(name, None)
        last = self._names.pop()
        if last != name:
            other = self._slot_of[last]
            self._base[slot], self._slope[slot] = self._base[other], self._slope[other]
            self._whole[:, slot] = self._whole[:, other]
            self._names[slot] = last
            self._slot_of[last] = slot

    def computed(self, name: Hashable, tokens: int) -> None:
        """So many of a request's tokens have pages; matters while its prompt comes in chunks."""
        prompt, generated, _ = self._whole[:, self._slot_of[name]].tolist()
        if tokens < prompt + generated:
            self._coming[name] = prompt + generated - tokens
        else:
            self._coming.pop(name, None)

    def generated(self, name: Hashable, tokens: int) -> None:
        """A request has generated so many tokens."""
        self._whole[1, self._slot_of[name]] = tokens

    def advance(self, names: Iterable[Hashable] | None = None, tokens: int = 1) -> None:
        """Some requests, or all, generated another token (or so many) each."""
        if names is None:
            self._whole[1, : len(self._names)] += tokens
        else:
            self._whole[1, [self._slot_of[name] for name in names]] += tokens

    @property
    def names(self) -> Sequence[Hashable]:
        """Names of the requests, in the order that ``generated_by`` wants."""
        return self._names

    @property
    def coming(self) -> Iterable[Hashable]:
        """Names of those whose prompts are not computed yet."""
        return self._coming

    def generated_by(self, tokens: Sequence[int]) -> None:
        """What each request has generated, in the order of ``names``."""
        self._whole[1, : len(self._names)] = tokens

    def _pages(self, used: int) -> NDArray[np.int64]:
        """Pages that each request's tokens fill."""
        tokens: NDArray[np.int64] = self._whole[0, :used] + self._whole[1, :used]
        tokens += self._page - 1
        tokens //= self._page
        return tokens

    def _missing(self) -> int:
        """Pages that running requests will get for tokens that they have already."""
        missing = 0
        for name, tokens in self._coming.items():
            prompt, generated, _ = self._whole[:, self._slot_of[name]].tolist()
            whole = prompt + generated
            missing += -(-whole // self._page) - -(-(whole - tokens) // self._page)
        return missing

    def held(self) -> float:
        """Pages that running requests hold now, their states included."""
        used = len(self._names)
        return float(self._pages(used).sum()) + self._state * used - self._missing()

    def reserve(self, risk: float) -> int:
        """Pages that running requests may need on top of what they hold.

        Args:
            risk: Standard deviations to be safe by.
        """
        used = len(self._names)
        if not used:
            return 0
        # [horizons, requests] from here on.
        lengths = np.add.outer(self._ahead, self._whole[1, :used])
        low = self._bins.below(lengths)
        low += self._offsets[:used]
        alive = self._slope.ravel().take(low)
        alive *= lengths
        alive += self._base.ravel().take(low)
        alive /= np.maximum(alive[0], 1e-12)
        pages = self._pages(used) - self._whole[2, :used]
        need = np.add.outer(self._ahead_pages, pages + self._state)
        now = float(need[0].sum())
        most = need.sum(axis=1)
        expected = alive * need
        mean = expected.sum(axis=1)
        # p * (1 - p) * need**2
        need -= expected
        need *= expected
        need_at = np.minimum(mean + risk * np.sqrt(need.sum(axis=1)), most)
        missing = self._missing() if self._coming else 0
        return max(math.ceil(float(need_at.max()) - now + missing - 1e-9), 0)
