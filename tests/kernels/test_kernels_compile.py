"""Every kernel compiles ahead of time for the cards it is meant for, and fits them.

Prints registers, spilled bytes and shared memory of every variant (``pytest -s``).
"""

from __future__ import annotations

import pytest
import torch
from ahead_of_time import SHARED_LIMIT, Binary, compiling_for, empty
from avmp_kernels import (
    attention,
    conv1d,
    kv_write,
    page_table,
    relocate,
    selective_scan,
    state_update,
)
from avmp_kernels.check import HandleCheck
from avmp_kernels.pages import PageTable
from avmp_kernels.resolve import Resolver
from avmp_kernels.saves import ChunkSaves

CAPABILITIES = sorted(SHARED_LIMIT)
_I32, _I64 = torch.int32, torch.int64
_FP16, _BF16, _FP8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn


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


def _kv_views(head_size: int, kv_heads: int, page_tokens: int, dtype: torch.dtype):
    """Return one of four layers' key and value caches, strided as inside of a page."""
    pages = empty(4000, 4, kv_heads, page_tokens, 2 * head_size, dtype=dtype)
    return pages[:, 1].transpose(1, 2).split(head_size, dim=-1)


def _scales(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    one = empty(1, dtype=torch.float32)
    return {"k_scale": one, "v_scale": one} if dtype == _FP8 else {}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("head_size", "query_type", "cache_type", "page_tokens", "softcap"),
    [
        (128, _BF16, _BF16, 16, 0.0),
        (128, _FP16, _FP16, 64, 0.0),
        (128, _BF16, _FP8, 16, 0.0),
        (64, _BF16, _BF16, 16, 0.0),
        (256, _BF16, _BF16, 16, 50.0),
    ],
)
def test_attention(
    capability, head_size, query_type, cache_type, page_tokens, softcap, monkeypatch
) -> None:
    """A mixed batch and split decodes: prefill, decode and merge kernels."""
    heads, kv_heads, requests, rows = 32, 8, 64, 2048
    keys, values = _kv_views(head_size, kv_heads, page_tokens, cache_type)
    query = empty(rows, heads, head_size, dtype=query_type)
    with compiling_for(capability, monkeypatch) as binaries:
        attention.paged_attention(
            query,
            query,
            keys,
            values,
            empty(requests, 1024, dtype=_I32),
            empty(requests, dtype=_I32),
            empty(requests + 1, dtype=_I32),
            rows,
            head_size**-0.5,
            pages=_pages(),
            softcap=softcap,
            segments=8,
            workspace=empty(1 << 30, dtype=torch.float32),
            **_scales(cache_type),
        )
    _accept(binaries, "_prefill_kernel", "_decode_kernel", "_merge_kernel")
    decode = next(binary for binary in binaries if binary.kernel == "_decode_kernel")
    # Keys and values of later tiles are on their way while one is worked on, 16 bytes a thread.
    assert "LDGSTS.E.BYPASS.128" in decode.sass()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_state_update(capability: int, monkeypatch) -> None:
    """Mamba-1 with Jamba's shape, Mamba-2 with 64 x 128 heads; 16-bit and 32-bit states."""
    batch = 256
    handles = empty(batch, dtype=_I32)
    with compiling_for(capability, monkeypatch) as binaries:
        for state_type, dtype in ((_BF16, _BF16), (torch.float32, _BF16), (_FP16, _FP16)):
            x = empty(batch, 8192, dtype=dtype)
            states = empty(500, 2, 8192, 16, dtype=state_type)[:, 1]
            narrow = empty(batch, 16, dtype=dtype)
            wide = empty(8192, dtype=torch.float32)
            A = empty(8192, 16, dtype=torch.float32)
            state_update.selective_state_update(
                x, states, handles, x, x, A, narrow, narrow, wide, x, wide, pages=_pages()
            )
        x = empty(batch, 64, 64, dtype=_BF16)
        states = empty(500, 2, 64, 64, 128, dtype=_BF16)[:, 1]
        per_head = empty(64, dtype=torch.float32)[:, None].expand(-1, 64)
        state_update.selective_state_update(
            x,
            states,
            handles,
            x,
            empty(batch, 64, dtype=_BF16)[..., None].expand(-1, -1, 64),
            per_head[..., None].expand(-1, -1, 128),
            empty(batch, 8, 128, dtype=_BF16),
            empty(batch, 8, 128, dtype=_BF16),
            per_head,
            None,
            per_head,
            pages=_pages(),
        )
    _accept(binaries, "_state_update_kernel")
    assert len(binaries) == 4
    for binary in binaries:
        assert "LDG.E.128" in binary.sass(), "states are read less than 16 bytes at a time"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("cache_type", [_FP16, _BF16, _FP8])
def test_kv_write(capability: int, cache_type: torch.dtype, monkeypatch) -> None:
    """Keys and values by slot, fp8 by hardware or in integers."""
    keys, values = _kv_views(128, 8, 16, cache_type)
    new = empty(512, 8, 128, dtype=_FP16 if cache_type == _FP16 else _BF16)
    slots = empty(512, dtype=_I64)
    with compiling_for(capability, monkeypatch) as binaries:
        kv_write.kv_write(new, new, keys, values, slots, pages=_pages(), **_scales(cache_type))
    _accept(binaries, "_kv_write_kernel")
    assert "LDG.E.128" in binaries[0].sass()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [_FP16, _BF16])
def test_mamba_prefill(capability: int, dtype: torch.dtype, monkeypatch) -> None:
    """Conv1d, its update and the scan with Jamba's shape, as the model's layers pass it."""
    rows, dim, n, width, requests = 4096, 8192, 16, 4, 8
    handles = empty(requests, dtype=_I32)
    starts = empty(requests + 1, dtype=_I32)
    has_initial = empty(requests, dtype=torch.bool)
    x, z = empty(rows, 2 * dim, dtype=dtype).chunk(2, dim=1)
    out, dt = empty(rows, dim, dtype=dtype), empty(rows, dim, dtype=dtype)
    conv_states = empty(500, 2, width - 1, dim, dtype=dtype)[:, 1].transpose(1, 2)
    states = empty(500, 2, dim, n, dtype=dtype)[:, 1]
    weight, bias = empty(dim, width, dtype=dtype), empty(dim, dtype=dtype)
    narrow, wide = empty(rows, n, dtype=dtype), empty(dim, dtype=torch.float32)
    A = empty(dim, n, dtype=torch.float32)
    saves = ChunkSaves(empty(requests, 3, dtype=_I32), empty(requests, 3, dtype=_I32))
    with compiling_for(capability, monkeypatch) as binaries:
        conv1d.causal_conv1d(
            out, conv_states, handles, starts, has_initial, x, weight, bias, saves=saves,
            pages=_pages(),
        )  # fmt: skip
        conv1d.causal_conv1d_update(
            out[:requests], conv_states, handles, x[:requests], weight, bias, pages=_pages()
        )
        for saved in (None, saves):
            selective_scan.selective_scan(
                out, states, handles, starts, has_initial, x, dt, A, narrow, narrow, wide, z, wide,
                saves=saved, pages=_pages(),
            )  # fmt: skip
    _accept(binaries, "_save_kernel", "_prefill_kernel", "_update_kernel", "_selective_scan_kernel")


def test_page_table_keeps_the_lookahead(monkeypatch) -> None:
    """With handles as many tiles of keys are on their way as with physical indices."""
    keys, values = _kv_views(128, 8, 16, _BF16)
    query = empty(64, 32, 128, dtype=_BF16)
    rows = empty(65, dtype=_I32)
    with compiling_for(90, monkeypatch) as binaries:
        for pages in (None, _pages()):
            attention.paged_attention(
                query, query, keys, values, empty(64, 64, dtype=_I32), rows[:64], rows, 1, 0.1,
                pages=pages, segments=1,
            )  # fmt: skip
    physical, handles = binaries
    in_flight = 2 * 2 * 8192  # two tiles of keys and of values, 8 KiB each
    assert handles.shared >= physical.shared >= in_flight


def test_benchmark_launches(monkeypatch) -> None:
    """Every launch that `avmp bench kernels` times compiles for Hopper and fits."""
    from avmp_vllm.bench import kernels

    with compiling_for(90, monkeypatch) as binaries:
        for make in kernels.timings(torch.device("meta")):
            workload = make()
            before = len(binaries)
            workload.run()
            assert len(binaries) > before, workload.name
    for binary in binaries:
        assert binary.stack == 0, f"spills: {binary}"
        assert binary.shared <= SHARED_LIMIT[90], f"does not fit: {binary}"


def test_spills_are_seen(monkeypatch) -> None:
    """With few registers a kernel spills, and the figures show it: the checks above can fail."""
    prefill = attention._prefill_shape
    monkeypatch.setattr(attention, "_prefill_shape", lambda *at: prefill(*at)._replace(warps=4))
    keys, values = _kv_views(128, 8, 16, _BF16)
    query = empty(2048, 32, 128, dtype=_BF16)
    rows = empty(65, dtype=_I32)
    with compiling_for(80, monkeypatch) as binaries:
        attention.paged_attention(
            query, query, keys, values, empty(64, 64, dtype=_I32), rows[:64], rows, 2048, 0.1,
            pages=_pages(), segments=1,
        )  # fmt: skip
    assert binaries[0].stack > 0
