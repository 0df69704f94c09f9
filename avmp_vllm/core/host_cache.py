"""Pages and states on the host: which are there, in which rows, and which go for others.

The host's memory is rows of one KV page each. ``span`` rows that follow each other are a *slab*,
the least that holds a state::

    row      0   1   2   3 | 4   5   6   7 | 8   9  10  11 | ...       span = 4
    slab     page page .  page|    state     |  .   .   .   .  |

A slab holds pages or one state, whatever came first, and is free for either when it is empty again.
So nothing is set aside for one kind, and nothing ever moves. What goes for a page is what was used
least recently; for a state, it is the slab that was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

from avmp_vllm.core.handles import Kind


@dataclass(eq=False, slots=True)
class Entry:
    """A page or a state on the host.

    Attributes:
        kind: Which of them.
        row: Its first row.
        used: When it was used last, by a logical clock.
        readers: Transfers that read it.
        ready: Whether its bytes have arrived.
    """

    kind: Kind
    row: int
    used: int
    readers: int = 0
    ready: bool = False

    @property
    def pinned(self) -> bool:
        """Whether a transfer reads or writes it."""
        return bool(self.readers) or not self.ready


class HostCache:
    """What is on the host.

    Args:
        slabs: Of the host's memory.
        span: Rows of a slab.

    Attributes:
        rows: Of the host's memory.
        reading_rows: That transfers read.
        writing_rows: That transfers write.
    """

    def __init__(self, slabs: int, span: int) -> None:
        self.span = span
        self.rows = slabs * span
        self._slabs = slabs
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # Least recently used first.
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._clock = self.reading_rows = self.writing_rows = 0
        self._empty = list(range(self._slabs))[::-1]
        # Free rows of slabs with pages; of every slab in use, who is there.
        self._open: dict[int, list[int]] = {}
        self._inside: dict[int, set[Hashable]] = {}
        self._free_rows = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Entry | None:
        """What is there by a key."""
        return self._entries.get(key)

    @property
    def used_rows(self) -> int:
        """Rows that hold something."""
        return self.rows - self._free_rows - len(self._empty) * self.span

    def begin_read(self, keys: Iterable[Hashable]) -> list[Entry]:
        """A transfer reads entries, which must be ready, and stay until it has ended."""
        entries = [self._entries[key] for key in keys]
        for entry in entries:
            assert entry.ready
            if not entry.readers:
                self.reading_rows += self._rows_of(entry)
            entry.readers += 1
        return entries

    def end_read(self, keys: Iterable[Hashable]) -> None:
        """A transfer has read entries."""
        for key in keys:
            entry = self._entries[key]
            entry.readers -= 1
            if not entry.readers:
                self.reading_rows -= self._rows_of(entry)

    def end_write(self, keys: Iterable[Hashable], arrived: bool = True) -> list[Hashable]:
        """A transfer has written entries, or failed to: then they go.

        Returns:
            Those that were waiting for it.
        """
        ended = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.ready:
                continue
            ended.append(key)
            entry.ready = True
            self.writing_rows -= self._rows_of(entry)
            if not arrived:
                self.remove(key)
        return ended

    def _rows_of(self, entry: Entry) -> int:
        return self.span if entry.kind is Kind.SSM else 1

    def use(self, keys: Iterable[Hashable]) -> None:
        """Entries were of use, the last of them most recently; those that are gone were not."""
        for key in keys:
            entry = self._entries.get(key)
            if entry is not None:
                self._clock += 1
                entry.used = self._clock
                self._entries.move_to_end(key)

    def add(
        self, kind: Kind, keys: Collection[Hashable], beside: Collection[Hashable] = ()
    ) -> list[Hashable] | None:
        """Make entries, all of them or none. They are not ready, and stay until they are.

        Args:
            kind: Of all of them.
            keys: That are not there.
            beside: Keys that must not go for them.

        Returns:
            The keys that went for them; None if there is no room, and nothing has changed.
        """
        gone = self._victims(kind, len(keys), beside)
        if gone is None:
            return None
        for key in gone:
            self.remove(key)
        for key in keys:
            assert key not in self._entries, key
            row = self._take(kind)
            self._clock += 1
            self._entries[key] = entry = Entry(kind, row, self._clock)
            self.writing_rows += self._rows_of(entry)
            self._inside.setdefault(row // self.span, set()).add(key)
        return gone

    def remove(self, key: Hashable) -> None:
        """Forget an entry that no transfer reads or writes; its rows are free."""
        entry = self._entries.pop(key)
        assert not entry.pinned
        slab = entry.row // self.span
        inside = self._inside[slab]
        inside.remove(key)
        if inside:
            self._open.setdefault(slab, []).append(entry.row)
            self._free_rows += 1
        else:
            del self._inside[slab]
            self._free_rows -= len(self._open.pop(slab, ()))
            self._empty.append(slab)

    def _take(self, kind: Kind) -> int:
        """A free row of a page, or the first of a free slab."""
        if kind is Kind.KV and self._open:
            slab = next(iter(self._open))
            rows = self._open[slab]
            row = rows.pop()
            if not rows:
                del self._open[slab]
            self._free_rows -= 1
            return row
        first = self._empty.pop() * self.span
        if kind is Kind.KV and self.span > 1:
            self._open[first // self.span] = list(range(first + 1, first + self.span))[::-1]
            self._free_rows += self.span - 1
        return first

    def _victims(
        self, kind: Kind, count: int, beside: Collection[Hashable]
    ) -> list[Hashable] | None:
        """What goes for so many entries of a kind; None if not enough can."""
        if kind is Kind.SSM:
            return self._slabs_to_clear(count - len(self._empty), beside)
        missing = count - self._free_rows - len(self._empty) * self.span
        found: list[Hashable] = []
        for key, entry in self._entries.items():
            if missing <= 0:
                break
            if not entry.pinned and key not in beside:
                found.append(key)
                missing -= self._rows_of(entry)
        return None if missing > 0 else found

    def _slabs_to_clear(self, count: int, beside: Collection[Hashable]) -> list[Hashable] | None:
        """What is in the slabs that were used least recently, of those that can be cleared."""
        if count <= 0:
            return []
        entries = self._entries
        ages = sorted(
            (max(entries[key].used for key in inside), slab)
            for slab, inside in self._inside.items()
            if not any(entries[key].pinned or key in beside for key in inside)
        )
        if len(ages) < count:
            return None
        return [
            key
            for _, slab in ages[:count]
            for key in sorted(self._inside[slab], key=lambda key: entries[key].used)
        ]

    def problems(self) -> list[str]:
        """What does not add up; nothing."""
        found = []
        rows: list[int] = []
        for key, entry in self._entries.items():
            rows += range(entry.row, entry.row + self._rows_of(entry))
            if key not in self._inside.get(entry.row // self.span, ()):
                found.append(f"{key!r} is not in its slab")
        free = [row for slab in self._open.values() for row in slab]
        if len(free) != self._free_rows:
            found.append(f"{self._free_rows} free rows counted, {len(free)} in the slabs")
        free += [slab * self.span + row for slab in self._empty for row in range(self.span)]
        if sorted(rows + free) != list(range(self.rows)):
            found.append("rows are lost, or have two owners")
        entries = list(self._entries.values())
        reading = sum(self._rows_of(entry) for entry in entries if entry.readers)
        writing = sum(self._rows_of(entry) for entry in entries if not entry.ready)
        if (reading, writing) != (self.reading_rows, self.writing_rows):
            found.append(f"{reading} rows are read and {writing} written, and were not counted so")
        ages = [entry.used for entry in entries]
        if ages != sorted(ages):
            found.append("entries are not in the order of their use")
        return found
