"""A driver in Python that forgives nothing and fails on request; a stream whose work takes time."""

from __future__ import annotations

from avmp_vllm.backing.elastic_buffer import Fence
from avmp_vllm.backing.memory import DriverError, OutOfMemory, VirtualMemory


class InFlight(AssertionError):
    """Memory was taken from work that still runs."""


class StrictMemory(VirtualMemory):
    """Counts what exists, forgets nothing, and refuses to unmap what work in flight may touch.

    Args:
        capacity: Handles that exist at most.
        granularity: Bytes.
    """

    name = "strict"
    aliases = False

    def __init__(self, capacity: int, granularity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.granularity = granularity
        self.alive: set[int] = set()
        self.where: dict[int, int] = {}  # address: handle
        self.allowed: set[int] = set()
        #: Addresses that work in flight may touch, and how often.
        self.in_flight: dict[int, int] = {}
        self.calls: list[str] = []
        #: Calls of a kind until one fails, by kind.
        self.fail_after: dict[str, int] = {}
        self._next = 1

    def _count(self, kind: str) -> None:
        if kind in self.fail_after:
            self.fail_after[kind] -= 1
            if self.fail_after[kind] < 0:
                del self.fail_after[kind]
                raise DriverError(f"{kind} failed, as a test wants it", 999)
        self.calls.append(kind)

    def _reserve(self, size: int) -> int:
        self._count("reserve")
        return 1 << 40

    def _free(self, address: int, size: int) -> None:
        self._count("free")

    def _create(self, size: int) -> int:
        if len(self.alive) >= self.capacity:
            raise OutOfMemory("the strict memory is full")
        self._count("create")
        handle, self._next = self._next, self._next + 1
        self.alive.add(handle)
        return handle

    def _release(self, handle: int) -> None:
        self._count("release")
        assert handle not in self.where.values(), "released while mapped"
        self.alive.remove(handle)

    def _map(self, address: int, handle: int, size: int) -> None:
        self._count("map")
        self.where[address] = handle

    def _allow(self, address: int, size: int) -> None:
        self._count("allow")
        self.allowed |= {at for at in self.where if address <= at < address + size}

    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        for start, _ in run:
            if self.in_flight.get(start):
                raise InFlight(f"{start:#x} is unmapped under work in flight")
        self._count("unmap")
        for start, _ in run:
            del self.where[start]
            self.allowed.discard(start)


class Stream:
    """Work that is launched in order and ends in order, when the test lets it.

    Args:
        memory: Told which addresses are in use.
    """

    def __init__(self, memory: StrictMemory) -> None:
        self._memory = memory
        self._work: list[tuple[int, set[int]]] = []
        self._launched = 0
        self.done = 0
        #: Whether fences tell the truth (negative control).
        self.honest = True

    def launch(self, addresses: set[int]) -> None:
        """Start work that touches addresses: all of them must be mapped and allowed."""
        assert addresses <= self._memory.allowed, "work touches what has no memory"
        self._launched += 1
        self._work.append((self._launched, addresses))
        for address in addresses:
            in_flight = self._memory.in_flight
            in_flight[address] = in_flight.get(address, 0) + 1

    def finish(self, count: int = 1) -> None:
        """Let the oldest work end."""
        for number, addresses in self._work[:count]:
            self.done = number
            for address in addresses:
                self._memory.in_flight[address] -= 1
        del self._work[:count]

    def finish_all_but(self, count: int) -> None:
        """Let all work end but the newest."""
        self.finish(max(len(self._work) - count, 0))

    def record(self) -> Fence:
        """A fence behind everything launched so far."""
        return _Event(self, self._launched)

    def until(self, number: int) -> None:
        """Wait for work."""
        while self._work and self._work[0][0] <= number:
            self.finish()


class _Event:
    def __init__(self, stream: Stream, number: int) -> None:
        self._stream, self._number = stream, number

    def query(self) -> bool:
        return self._number <= self._stream.done or not self._stream.honest

    def synchronize(self) -> None:
        self._stream.until(self._number)
