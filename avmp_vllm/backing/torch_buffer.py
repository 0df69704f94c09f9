"""An arena's bytes in one torch buffer, and move plans applied to them.

Copies and fills are issued in plan order on the current stream, so on an accelerator they need no
synchronisation of their own: what the previous step wrote is finished before, and what the next
step reads comes after.
"""

from __future__ import annotations

import torch

from avmp_vllm.backing.state_codec import StateCodec
from avmp_vllm.core import Geometry, Kind, MovePlan, Recode

#: Copies go by words of this type; every page size is a multiple of its eight bytes.
WORD = torch.int64


class TorchBuffer:
    """The device buffer of an arena.

    Args:
        raw: Flat tensor over at least ``geometry.arena_bytes`` bytes, of any dtype and device.
        geometry: Sizes of the pages in it.
        codec: Of states that are encoded; None where none is.

    Raises:
        ValueError: A page size is not a multiple of a word, or the buffer is too short.
    """

    def __init__(
        self, raw: torch.Tensor, geometry: Geometry, codec: StateCodec | None = None
    ) -> None:
        for kind in Kind:
            if geometry.unit(kind) % WORD.itemsize:
                raise ValueError(
                    f"a {kind.label} page of {geometry.unit(kind)} bytes is not a multiple of "
                    f"{WORD.itemsize}"
                )
        self._bytes = raw.view(torch.uint8)
        if self._bytes.numel() < geometry.arena_bytes:
            raise ValueError(
                f"the buffer has {self._bytes.numel()} bytes, the arena {geometry.arena_bytes}"
            )
        usable = self._bytes.numel() // WORD.itemsize * WORD.itemsize
        words = self._bytes[:usable].view(WORD)
        # On the host NumPy moves the same bytes with a tenth of the calls' cost.
        self._words = words.numpy() if words.device.type == "cpu" else words
        self._unit = {kind: geometry.unit(kind) // WORD.itemsize for kind in Kind}
        self._blocks = BlockBytes(self._bytes, geometry, codec)

    def page(self, kind: Kind, index: int) -> slice:
        """Where a page's words are, by physical index."""
        unit = self._unit[kind]
        return slice(index * unit, (index + 1) * unit)

    def apply(self, plan: MovePlan) -> None:
        """Carry a plan out: relocations in order, then zeroing, then copy-on-write."""
        words, page = self._words, self.page
        for relocations, recode in plan.in_order():
            for move in relocations:
                words[page(move.kind, move.target)] = words[page(move.kind, move.source)]
            if recode is not None:
                self._blocks.recode(recode)
        for index in plan.zeros:
            words[page(Kind.KV, index)] = 0
        for copy in plan.copies:
            words[page(copy.kind, copy.target)] = words[page(copy.kind, copy.source)]


class BlockBytes:
    """The SSM blocks of an arena, for what reads them by their layers.

    Args:
        raw: Flat uint8 bytes of the arena.
        geometry: Sizes.
        codec: Of states that are encoded.
    """

    def __init__(self, raw: torch.Tensor, geometry: Geometry, codec: StateCodec | None) -> None:
        self._bytes, self._unit, self._codec = raw, geometry.block_bytes, codec

    def recode(self, recode: Recode) -> None:
        """Encode a state or decode it."""
        assert self._codec is not None, "no state is encoded without a codec"
        work = self._codec.encode if recode.encode else self._codec.decode
        work(self._block(recode.source), self._block(recode.target), recode.half)

    def _block(self, index: int) -> torch.Tensor:
        return self._bytes[index * self._unit : (index + 1) * self._unit]


def bytes_behind(cache: torch.Tensor) -> torch.Tensor:
    """The whole buffer that a layer's cache is a view of, as flat uint8."""
    storage = cache.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
