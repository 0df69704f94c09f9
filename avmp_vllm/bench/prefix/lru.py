"""Cached entries in the order in which they would be given up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

#: What the benchmark's caches keep under one name space: pages and states of the same position.
PAGE_KIND, STATE_KIND = 0, 1


def page_key(key: int) -> int:
    """Name of the page that ends a prefix."""
    return 2 * key


def state_key(key: int) -> int:
    """Name of the state behind a prefix."""
    return 2 * key + 1


class Lru:
    """Entries of several sizes; the one that has been idle longest goes first.

    vLLM does not look whether what it computes is cached already, so a key may have several
    entries; the oldest of them is found. An entry is *held* while a request uses it, and cannot be
    given up then::

        entries = held + idle,  used = bytes of both <= memory

    Args:
        memory: Bytes.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.used = 0
        self.gone = [0, 0]  # entries given up, by kind of the first name
        self._entries: dict[int, tuple[int, tuple[int, ...]]] = {}  # size, names
        self._found: dict[int, int | list[int]] = {}  # nearly all names have one entry
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._next = 0

    def find(self, name: int) -> int | None:
        """An entry of that name."""
        found = self._found.get(name)
        return found[0] if isinstance(found, list) else found

    def hold(self, entry: int) -> None:
        """Keep an idle entry from being given up."""
        self._idle.pop(entry, None)

    def release(self, entries: Iterable[int]) -> None:
        """Let go of entries, the one to be given up first in front."""
        for entry in entries:
            self._idle[entry] = None

    def add(self, names: tuple[int, ...], size: int) -> int | None:
        """Enter something new, held; None if all that is idle does not make room for it."""
        if self.used + size > self.memory and not self.make_room(size):
            return None
        entry = self._next
        self._next += 1
        self.used += size
        self._entries[entry] = size, names
        for name in names:
            found = self._found.setdefault(name, entry)
            if isinstance(found, list):
                found.append(entry)
            elif found != entry:
                self._found[name] = [found, entry]
        return entry

    def make_room(self, size: int) -> bool:
        """Give idle entries up until so many bytes are free."""
        while self.used + size > self.memory:
            if not self._idle:
                return False
            entry, _ = self._idle.popitem(last=False)
            freed, names = self._entries.pop(entry)
            self.used -= freed
            self.gone[names[0] & 1] += 1
            for name in names:
                found = self._found[name]
                if isinstance(found, list):
                    found.remove(entry)
                    if len(found) == 1:
                        self._found[name] = found[0]
                else:
                    del self._found[name]
        return True

    def verify(self) -> None:
        """Raise AssertionError if the books do not add up."""
        assert self.used == sum(size for size, _ in self._entries.values())
        assert self._entries.keys() >= self._idle.keys()
        named = sorted((n, e) for e, (_, names) in self._entries.items() for n in names)
        found = ((n, e if isinstance(e, list) else [e]) for n, e in self._found.items())
        assert named == sorted((name, entry) for name, several in found for entry in several)
