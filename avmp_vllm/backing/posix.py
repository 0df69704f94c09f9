"""Virtual memory of the host: anonymous memory, and a memory file where a handle needs aliases.

An unmapped page must fault, as on a device. ``MADV_DONTNEED`` alone would answer with zeros, and a
read of what is gone would go unnoticed.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from avmp_vllm.backing import libc
from avmp_vllm.backing.memory import OutOfMemory, VirtualMemory

_HUGE = Path("/sys/kernel/mm/transparent_hugepage")


def huge_page_bytes() -> int:
    """Bytes of a huge page that anonymous memory can ask for; a page's where there are none."""
    try:
        if "[never]" in (_HUGE / "enabled").read_text():
            return mmap.PAGESIZE
        return int((_HUGE / "hpage_pmd_size").read_text())
    except (OSError, ValueError):
        return mmap.PAGESIZE


def available_bytes() -> int | None:
    """Memory that the system could give now, None if it does not say.

    Without a look at it, Linux grants what it does not have and kills a process later.
    """
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return None


class PosixMemory(VirtualMemory):
    """What both kinds of host memory share.

    Args:
        limit: Bytes that may be created in all; None: what the system has.
    """

    def __init__(self, limit: int | None = None) -> None:
        super().__init__()
        self._limit = limit
        self._created = 0
        self._next = 1

    def _take(self, size: int) -> int:
        """Count new memory; return its number."""
        if self._limit is not None and self._created + size > self._limit:
            raise OutOfMemory(
                f"{size} bytes beside {self._created} exceed the limit of {self._limit}"
            )
        available = available_bytes()
        if available is not None and size > available:
            raise OutOfMemory(f"{size} bytes are asked for, the system has {available}")
        self._created += size
        self._next += 1
        return self._next - 1

    def _reserve(self, size: int) -> int:
        return libc.reserve_addresses(size, self.granularity)

    def _free(self, address: int, size: int) -> None:
        libc.unmap_pages(address, size)

    def _allow(self, address: int, size: int) -> None:
        libc.protect(address, size, libc.PROT_ALL)


class AnonymousMemory(PosixMemory):
    """Anonymous memory, in huge pages where the system has them.

    A handle's memory waits at an address of its own, its *home*. Mapping moves the page table
    entries (``mremap``) and copies nothing, so a handle that was created has its memory for good:
    mapping cannot run out of it, and the first access after it does not fault.

    Args:
        limit: Bytes that may be created in all; None: what the system has.
        huge: Whether to ask for huge pages, whose size is then the granularity.
    """

    name = "POSIX, anonymous"
    aliases = False

    def __init__(self, limit: int | None = None, huge: bool = True) -> None:
        super().__init__(limit)
        self.granularity = huge_page_bytes() if huge else mmap.PAGESIZE
        self._home: dict[int, tuple[int, int]] = {}
        self._released: set[int] = set()

    def _create(self, size: int) -> int:
        handle = self._take(size)
        home = None
        try:
            home = libc.reserve_addresses(size, self.granularity)
            libc.map_pages(home, size, libc.PROT_ALL, libc.PRIVATE | libc.MAP_FIXED)
            if self.granularity > mmap.PAGESIZE:
                libc.advise(home, size, libc.MADV_HUGEPAGE)
            libc.advise(home, size, libc.MADV_POPULATE_WRITE)
            libc.protect(home, size, libc.PROT_NONE)
        except BaseException:
            self._created -= size
            if home is not None:
                libc.unmap_pages(home, size)
            raise
        self._home[handle] = home, size
        return handle

    def _release(self, handle: int) -> None:
        if self._handles[handle].mappings:
            self._released.add(handle)
            return
        home, size = self._home.pop(handle)
        libc.unmap_pages(home, size)
        self._created -= size

    def _map(self, address: int, handle: int, size: int) -> None:
        libc.move_pages(self._home[handle][0], size, address)

    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        libc.protect(address, size, libc.PROT_NONE)
        for start, handle in run:
            home, length = self._home[handle]
            libc.move_pages(start, length, home)
            if handle in self._released:
                self._released.remove(handle)
                del self._home[handle]
                libc.unmap_pages(home, length)
                self._created -= length


class MemfdMemory(PosixMemory):
    """A file in memory that has no name; a handle is a part of it, which may be mapped often.

    Args:
        limit: Bytes that may be created in all; None: what the system has.
    """

    name = "POSIX, memory file"
    aliases = True

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(limit)
        self.granularity = mmap.PAGESIZE
        self._file = os.memfd_create("avmp", os.MFD_CLOEXEC)
        self._end_of_file = 0
        self._parts: dict[int, tuple[int, int]] = {}
        self._holes: dict[int, list[int]] = {}
        self._released: set[int] = set()

    def _create(self, size: int) -> int:
        handle = self._take(size)
        holes = self._holes.get(size)
        offset = holes[-1] if holes else self._end_of_file
        try:
            libc.allocate_file(self._file, 0, offset, size)
        except BaseException:
            self._created -= size
            # What was allocated of it before the failure goes back.
            self._punch(offset, size)
            raise
        if holes:
            holes.pop()
        else:
            self._end_of_file += size
        self._parts[handle] = offset, size
        return handle

    def _punch(self, offset: int, size: int) -> None:
        mode = libc.FALLOC_FL_PUNCH_HOLE | libc.FALLOC_FL_KEEP_SIZE
        libc.allocate_file(self._file, mode, offset, size)

    def _release(self, handle: int) -> None:
        if self._handles[handle].mappings:
            self._released.add(handle)
            return
        offset, size = self._parts.pop(handle)
        self._punch(offset, size)
        self._holes.setdefault(size, []).append(offset)
        self._created -= size

    def _map(self, address: int, handle: int, size: int) -> None:
        offset, _ = self._parts[handle]
        flags = mmap.MAP_SHARED | libc.MAP_FIXED
        libc.map_pages(address, size, libc.PROT_NONE, flags, self._file, offset)

    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        libc.fault_again(address, size)
        for handle in {handle for _, handle in run} & self._released:
            mapped_here = sum(other == handle for _, other in run)
            if self._handles[handle].mappings == mapped_here:
                self._released.remove(handle)
                offset, length = self._parts.pop(handle)
                self._punch(offset, length)
                self._holes.setdefault(length, []).append(offset)
                self._created -= length

    def _close(self) -> None:
        os.close(self._file)
