"""Two pools with a split that is fixed at the start: the rival of a moving boundary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice

from avmp_vllm.core import AllocationFailure, Arena, Geometry, Kind, kind_of
from avmp_vllm.core.capacity import StaticSplit


class StaticArena(Arena):
    """An arena whose bands take everything at once and never move.

    Page sizes, placement and prefix cache are AVMP's, so that the split is the one difference.

    Args:
        geometry: Sizes in bytes.
        ratio: State bytes to KV bytes.
        on_evict: As in ``Arena``.
    """

    def __init__(
        self,
        geometry: Geometry,
        ratio: float,
        on_evict: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        super().__init__(geometry, on_evict=on_evict)
        split = StaticSplit(geometry, ratio)
        self._bands[Kind.SSM].grow(split.blocks)
        self._bands[Kind.KV].grow(split.pages)

    def fits(self, pages: int, blocks: int) -> bool:
        """Whether each pool can serve its part by itself."""
        return pages <= self.available(Kind.KV) and blocks <= self.available(Kind.SSM)

    def available(self, kind: Kind) -> int:
        """Free and evictable pages of a pool."""
        return self.free(kind) + self.cached(kind)

    def _make_room(self, pages: int, blocks: int) -> None:
        """Evict what is chosen, or else from the pool that is short alone."""
        if not self.fits(pages, blocks):
            self.note_failure(pages, blocks)
            raise AllocationFailure(f"{pages} KV page(s) and {blocks} SSM block(s) do not fit")
        for kind, wanted in ((Kind.KV, pages), (Kind.SSM, blocks)):
            while (missing := wanted - self.free(kind)) > 0:
                chosen = self.choose() if self.choose is not None else ()
                chosen = chosen or list(islice(self._cached[kind], missing))
                for each in Kind:
                    if evicted := [handle for handle in chosen if kind_of(handle) is each]:
                        self._evict(each, evicted)
