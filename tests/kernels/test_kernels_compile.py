"""Every kernel compiles ahead of time for the cards it is meant for, and fits them.

Prints registers, spilled bytes and shared memory of every variant (``pytest -s``).
"""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import SHARED_LIMIT, Binary, compiling_for, empty

from avmp_kernels import page_table, relocate
from avmp_kernels.check import HandleCheck
from avmp_kernels.pages import PageTable
from avmp_kernels.resolve import Resolver

CAPABILITIES = sorted(SHARED_LIMIT)
_I32, _I64 = torch.int32, torch.int64


def _pages() -> PageTable:
    return PageTable(empty(5000, dtype=_I32), 4000)


def _accept(binaries: list[Binary], *expected: str) -> None:
    """Print the binaries; require the expected kernels, no spills, and that they fit the card."""
    for binary in binaries:
        print(binary)
    assert {binary.kernel for binary in binaries} == set(expected)
    for binary in binaries:
        assert binary.stack == 0, f"spills: {binary}"
        assert binary.shared <= SHARED_LIMIT[binary.capability], f"does not fit: {binary}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_page_kernels(capability: int, monkeypatch) -> None:
    """Resolve, relocate, zero, update, check; pages are moved 16 bytes at a time."""
    sizes = (32 * 1024, 1_146_880)
    with compiling_for(capability, monkeypatch) as binaries:
        relocate.copy_pages(empty(1 << 30, dtype=torch.uint8), empty(40, 2, dtype=_I32), 30, sizes)
        relocate.zero_pages(empty(1 << 30, dtype=torch.uint8), empty(40, dtype=_I32), 30, sizes)
        page_table.write_entries(_pages(), empty(100, 2, dtype=_I32))
        table = empty(256, 1024, dtype=_I32)
        HandleCheck(1, table.device).check(0, table, table[:, 0], False, _pages(), 4000)
        resolver = Resolver([table, empty(256, 1, dtype=_I32)], [16, 1], [False, True], 8192)
        counts = empty(2, 256, dtype=_I32)
        for pages in (_pages(), None):
            rows = empty(200, dtype=_I32)
            starts = empty(201, dtype=_I32)
            resolver.resolve(rows, starts, empty(8192, dtype=_I64), rows, counts, pages, 256)
    _accept(
        binaries,
        "_copy_kernel",
        "_zero_kernel",
        "_update_kernel",
        "_check_kernel",
        "_resolve_kernel",
    )
    copy, zero = binaries[0].sass(), binaries[1].sass()
    assert "LDG.E.128" in copy
    assert "STG.E.128" in copy
    assert "STG.E.128" in zero
