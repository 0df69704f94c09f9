"""A driver that only keeps the books: what would be called, on no memory at all."""

from __future__ import annotations

from avmp_vllm.backing.memory import VirtualMemory


class NullMemory(VirtualMemory):
    """Every call succeeds and does nothing.

    Args:
        granularity: Bytes.
    """

    name = "none"
    aliases = False

    def __init__(self, granularity: int) -> None:
        super().__init__()
        self.granularity = granularity
        self._next = 1 << 20

    def _reserve(self, size: int) -> int:
        address = -(-self._next // self.granularity) * self.granularity
        self._next = address + size
        return address

    def _create(self, size: int) -> int:
        self._next += 1
        return self._next

    def _free(self, address: int, size: int) -> None:
        return

    def _release(self, handle: int) -> None:
        return

    def _map(self, address: int, handle: int, size: int) -> None:
        return

    def _allow(self, address: int, size: int) -> None:
        return

    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        return
