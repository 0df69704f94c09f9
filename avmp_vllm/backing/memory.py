"""Virtual memory: addresses that are reserved, and physical memory that is mapped to them.

::

    reserve -> addresses          no memory behind them: an access faults
    create  -> handle             physical memory, mapped nowhere
    map     handle at address     whole handles; an access still faults
    allow   addresses             a run of whole mappings; now reads and writes work
    unmap   addresses             a run of whole mappings; an access faults again
    release handle                its memory goes back once nothing maps it
    free    addresses             a whole reservation, with nothing mapped in it

The meaning is that of CUDA's driver; the memory of a handle keeps its bytes wherever it is mapped.
What is wrong is refused here, before a driver sees it, with the same error for every driver: some
would carry half of it out, and a driver's own error names no address.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType


class BackingError(RuntimeError):
    """A call on virtual memory that was refused, or that failed."""


class OutOfMemory(BackingError):
    """There is no physical memory, or no room for addresses. Nothing changed."""


class NotReserved(BackingError):
    """Addresses that do not lie in one reservation."""


class NotMapped(BackingError):
    """Addresses of which some have no memory."""


class AlreadyMapped(BackingError):
    """Addresses of which some have memory."""


class HalfMapping(BackingError):
    """Addresses that cut a mapping in two."""


class StillMapped(BackingError):
    """A reservation that cannot be freed: memory is mapped in it."""


class UnknownHandle(BackingError):
    """A handle that was never created, or is released."""


class NoAliases(BackingError):
    """A second mapping of a handle, from a driver that maps it once only."""


class Misaligned(BackingError):
    """An address or a size that is no multiple of the granularity."""


class DriverError(BackingError):
    """The driver's own error.

    Attributes:
        code: As the driver numbers it.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(slots=True)
class _Physical:
    """Physical memory of one handle."""

    size: int
    mappings: int = 0
    released: bool = False


class VirtualMemory(ABC):
    """A driver of virtual memory.

    Attributes:
        name: For messages and result files.
        granularity: Bytes of which every address and size is a multiple.
        aliases: Whether a handle may be mapped at several addresses at once.
    """

    name: str
    granularity: int
    aliases: bool

    def __init__(self) -> None:
        self._reserved: dict[int, int] = {}
        self._reserved_at: list[int] = []
        self._mapped: dict[int, int] = {}
        self._mapped_at: list[int] = []
        self._handles: dict[int, _Physical] = {}
        self._closed = False

    # -- addresses ---------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        """Reserve addresses.

        Returns:
            The first one, a multiple of the granularity.

        Raises:
            OutOfMemory: There is no room for so many addresses.
        """
        self._check_alignment(size)
        address = self._reserve(size)
        self._reserved[address] = size
        insort(self._reserved_at, address)
        return address

    def free(self, address: int) -> None:
        """Give a reservation back.

        Raises:
            NotReserved: The address is not the first of a reservation.
            StillMapped: Memory is mapped in it.
        """
        size = self._reserved.get(address)
        if size is None:
            raise NotReserved(f"{address:#x} is not the first address of a reservation")
        first = bisect_left(self._mapped_at, address)
        if first < len(self._mapped_at) and self._mapped_at[first] < address + size:
            raise StillMapped(f"memory is mapped at {self._mapped_at[first]:#x}")
        self._free(address, size)
        del self._reserved[address]
        self._reserved_at.remove(address)

    # -- memory ------------------------------------------------------------------------------------

    def create(self, size: int) -> int:
        """Take physical memory from the system.

        Returns:
            Its handle.

        Raises:
            OutOfMemory: The system has no more.
        """
        self._check_alignment(size)
        handle = self._create(size)
        self._handles[handle] = _Physical(size)
        return handle

    def release(self, handle: int) -> None:
        """Give physical memory back; what is mapped stays until it is unmapped.

        Raises:
            UnknownHandle: There is no such handle, or it is released.
        """
        physical = self._physical(handle)
        self._release(handle)
        physical.released = True
        if not physical.mappings:
            del self._handles[handle]

    # -- memory at addresses -----------------------------------------------------------------------

    def map(self, address: int, handle: int) -> None:
        """Map the whole memory of a handle. An access still faults until `allow`.

        Raises:
            UnknownHandle: There is no such handle, or it is released.
            NotReserved: Some of the addresses are not reserved.
            AlreadyMapped: Some of the addresses have memory.
            NoAliases: The handle is mapped, and the driver maps a handle once only.
        """
        physical = self._physical(handle)
        size = physical.size
        self._check_alignment(address)
        self._check_reserved(address, size)
        after = bisect_left(self._mapped_at, address + size)
        if after and self._end(self._mapped_at[after - 1]) > address:
            raise AlreadyMapped(f"memory is mapped at {self._mapped_at[after - 1]:#x}")
        if physical.mappings and not self.aliases:
            raise NoAliases(f"{self.name} maps a handle once only, and {handle} is mapped")
        self._map(address, handle, size)
        physical.mappings += 1
        self._mapped[address] = handle
        self._mapped_at.insert(after, address)

    def allow(self, address: int, size: int) -> None:
        """Let the device read and write a run of whole mappings.

        Raises:
            NotMapped: Some of the addresses have no memory.
            HalfMapping: The run cuts a mapping in two.
        """
        for _ in self._run(address, size):
            pass
        self._allow(address, size)

    def unmap(self, address: int, size: int) -> None:
        """Take the memory of a run of whole mappings away; accesses fault from here on.

        Raises:
            NotMapped: Some of the addresses have no memory.
            HalfMapping: The run cuts a mapping in two.
        """
        run = list(self._run(address, size))
        self._unmap(address, size, run)
        first = bisect_left(self._mapped_at, address)
        del self._mapped_at[first : first + len(run)]
        for start, handle in run:
            del self._mapped[start]
            physical = self._handles[handle]
            physical.mappings -= 1
            if physical.released and not physical.mappings:
                del self._handles[handle]

    # -- the end -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Unmap, release and free whatever is left. What ran on the memory must have ended."""
        if self._closed:
            return
        for address in list(self._mapped_at):
            self.unmap(address, self._end(address) - address)
        for handle in list(self._handles):
            self.release(handle)
        for address in list(self._reserved):
            self.free(address)
        self._closed = True
        self._close()

    def __enter__(self) -> VirtualMemory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the driver's part; the arguments are checked ----------------------------------------------

    @abstractmethod
    def _reserve(self, size: int) -> int:
        """Reserve addresses."""

    @abstractmethod
    def _free(self, address: int, size: int) -> None:
        """Free a reservation."""

    @abstractmethod
    def _create(self, size: int) -> int:
        """Take physical memory; return a number that names it and was never used before."""

    @abstractmethod
    def _release(self, handle: int) -> None:
        """Give physical memory back, at once or when nothing maps it any more."""

    @abstractmethod
    def _map(self, address: int, handle: int, size: int) -> None:
        """Map a handle."""

    @abstractmethod
    def _allow(self, address: int, size: int) -> None:
        """Let the device access a run."""

    @abstractmethod
    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        """Unmap a run, given also as (address, handle) of its mappings."""

    def _close(self) -> None:
        """Let go of what the driver itself holds."""
        return

    # -- checks ------------------------------------------------------------------------------------

    def _physical(self, handle: int) -> _Physical:
        physical = self._handles.get(handle)
        if physical is None or physical.released:
            raise UnknownHandle(f"handle {handle} was never created, or is released")
        return physical

    def _check_alignment(self, number: int) -> None:
        if number <= 0 or number % self.granularity:
            raise Misaligned(
                f"{number} is no positive multiple of the granularity of {self.granularity} bytes"
            )

    def _check_reserved(self, address: int, size: int) -> None:
        at = bisect_right(self._reserved_at, address) - 1
        if at < 0 or address + size > self._reserved_at[at] + self._reserved[self._reserved_at[at]]:
            raise NotReserved(f"{size} bytes from {address:#x} do not lie in one reservation")

    def _end(self, address: int) -> int:
        """End of the mapping that begins at an address."""
        return address + self._handles[self._mapped[address]].size

    def _run(self, address: int, size: int) -> Iterator[tuple[int, int]]:
        """The mappings that make up a run: address and handle."""
        end = address + size
        if size <= 0:
            raise NotMapped(f"a run of {size} bytes")
        if address not in self._mapped:
            before = bisect_left(self._mapped_at, address) - 1
            if before >= 0 and self._end(self._mapped_at[before]) > address:
                raise HalfMapping(f"a mapping begins at {self._mapped_at[before]:#x}, not here")
        while address < end:
            handle = self._mapped.get(address)
            if handle is None:
                raise NotMapped(f"no memory is mapped at {address:#x}")
            yield address, handle
            address += self._handles[handle].size
        if address > end:
            raise HalfMapping(f"the mapping that ends at {address:#x} would be cut at {end:#x}")
