"""The inputs on which kernels are checked and timed, from tiny ones to those of the target table.

Every workload owns an arena as the engine lays it out: the layer under test is one of several that
a page or block holds, physical places are a random permutation, and handles stand in the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from avmp_kernels import (
    attention,
    conv1d,
    kv_write,
    relocate,
    resolve,
    selective_scan,
    state_update,
)
from avmp_kernels.pages import SSM_TAG, PageTable
from avmp_kernels.reference import kv as kv_reference
from avmp_kernels.reference import pages as pages_reference
from avmp_kernels.reference import ssm as ssm_reference

LAYERS = 2  # layers a page or block holds; the second one is under test
I32 = torch.int32


@dataclass
class Workload:
    """One kernel at one shape.

    Attributes:
        name: Kernel and shape, for the table.
        run: Launches the kernel, with handles.
        moved: Bytes that must cross the memory bus at least.
        operations: Matrix operations it does.
        identity: The same launch with physical indices instead of handles.
        check: Compares the kernel's results with a float64 reference on the CPU; returns the
            largest error as a multiple of what is allowed. Slow: for small shapes.
        inputs: What a stock kernel needs for the same work, by name.
        stock: Which stock kernel that is, if there is one.
    """

    name: str
    run: Callable[[], object]
    moved: float
    operations: float = 0.0
    identity: Callable[[], object] | None = None
    check: Callable[[], float] | None = None
    inputs: dict[str, object] = field(default_factory=dict)
    stock: str | None = None


def error(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest error as a multiple of what rounding to ``dtype`` explains.

    Allowed is 4 units in the last place of a value or, for small values, of the root mean square.
    An element that was not written is NaN and gives infinity.
    """
    found, wanted = found.double().cpu(), wanted.double().cpu()
    if not wanted.numel():
        return 0.0
    size = torch.maximum(wanted.abs(), wanted.square().mean().sqrt())
    ratio = ((found - wanted).abs() / (size * 4 * torch.finfo(dtype).eps + 1e-30)).max()
    return float(ratio.nan_to_num(float("inf"), float("inf")))


def _table(num_kv: int, num_ssm: int) -> PageTable:
    """Return a random page table on the CPU."""
    null = torch.zeros(1, dtype=torch.int64)
    kv, ssm = (1 + torch.randperm(count - 1) for count in (num_kv, num_ssm))
    return PageTable(torch.cat([null, kv, null, ssm]).to(I32), num_kv)


def _on(device: torch.device, pages: PageTable) -> PageTable:
    return PageTable(pages.entries.to(device), pages.num_kv)


def _starts(lengths: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=I32, device=device)


def _to_cpu(arguments: dict[str, object]) -> dict[str, object]:
    """Return a copy of the arguments on the CPU, tensors with their strides given up."""

    def moved(value):
        if isinstance(value, PageTable):
            return PageTable(value.entries.cpu(), value.num_kv)
        return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value

    return {name: moved(value) for name, value in arguments.items()}


def relocation(total: int, page_bytes: tuple[int, int], kind: int, device) -> Workload:
    """Move ``total`` bytes of pages of one kind."""
    size = page_bytes[kind]
    count = max(total // size, 1)
    arena = torch.empty((2 * count + 1) * size, dtype=torch.uint8, device=device)
    arena.random_(0, 256)
    places = torch.randperm(2 * count)[: 2 * count].reshape(count, 2)
    pairs = places.to(I32).to(device)
    num_kv = count if kind == relocate.KV else 0

    def run():
        relocate.copy_pages(arena, pairs, num_kv, page_bytes)

    def check() -> float:
        wanted = arena.cpu()
        pages_reference.copy_pages(wanted, [(kind, *p) for p in places.tolist()], page_bytes)
        run()
        return 0.0 if torch.equal(arena.cpu(), wanted) else float("inf")

    label = "KV pages" if kind == relocate.KV else "SSM blocks"
    name = f"relocate {count * size / 2**20:.4g} MiB of {label} ({size} B)"
    return Workload(name, run, moved=2 * count * size, check=check)


def zeroing(total: int, page_bytes: tuple[int, int], device) -> Workload:
    """Clear ``total`` bytes of KV pages."""
    size = page_bytes[relocate.KV]
    count = max(total // size, 1)
    arena = torch.ones((2 * count + 1) * size, dtype=torch.uint8, device=device)
    places = torch.randperm(2 * count)[:count]
    targets = places.to(I32).to(device)

    def run():
        relocate.zero_pages(arena, targets, count, page_bytes)

    def check() -> float:
        wanted = arena.cpu()
        pages_reference.zero_pages(wanted, [(0, p) for p in places.tolist()], page_bytes)
        run()
        return 0.0 if torch.equal(arena.cpu(), wanted) else float("inf")

    return Workload(f"zero {count * size / 2**20:.4g} MiB", run, moved=count * size, check=check)


def resolving(requests: int, tokens: int, page_tokens: int, device) -> Workload:
    """Resolve a decode step of one KV group and one SSM group."""
    width = -(-tokens // page_tokens)
    pages = _on(device, _table(requests * width + 1, requests + 1))
    kv = (1 + torch.randperm(requests * width)).reshape(requests, width).to(I32).to(device)
    ssm = (SSM_TAG + 1 + torch.randperm(requests))[:, None].to(I32).to(device)
    resolver = resolve.Resolver([kv, ssm], [page_tokens, tokens], [False, True], requests)
    rows = torch.randperm(requests).to(I32).to(device)
    starts = torch.arange(requests + 1, dtype=I32, device=device)
    positions = torch.full((requests,), tokens - 1, dtype=torch.int64, device=device)
    lengths = torch.full((requests,), tokens, dtype=I32, device=device)
    counts = torch.tensor([[width] * requests, [1] * requests], dtype=I32, device=device)
    arguments = (rows, starts, positions, lengths, counts)

    def check() -> float:
        for buffer in (*resolver.block_tables, resolver.slot_mappings, resolver.state_indices):
            buffer.fill_(-7)
        resolver.resolve(*arguments, pages)
        table = pages._replace(entries=pages.entries.cpu())
        host = [tensor.cpu() for tensor in arguments[:4]]
        for group, (handles, is_ssm) in enumerate(((kv, False), (ssm, True))):
            wanted = pages_reference.resolve_group(
                handles.cpu(), page_tokens, is_ssm, not is_ssm, 0, *host, counts[group].cpu(),
                table, requests, requests, 1,
            )  # fmt: skip
            found = (
                resolver.block_tables[group],
                resolver.slot_mappings[group],
                resolver.state_indices[group],
            )
            if any(not torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True)):
                return float("inf")
        return 0.0

    return Workload(
        f"resolve {requests} x {tokens} tokens, pages of {page_tokens}",
        lambda: resolver.resolve(*arguments, pages),
        moved=requests * width * 4 * 3,
        identity=lambda: resolver.resolve(*arguments, None),
        check=check,
        inputs={
            "kv": kv, "ssm": ssm, "page_tokens": page_tokens, "rows": rows, "starts": starts,
            "positions": positions, "state_tokens": tokens,
        },
        stock="resolve",
    )  # fmt: skip


def _kv_layer(pages: int, heads: int, page_tokens: int, head_size: int, dtype, device):
    """Return key and value views of one layer, over random bytes that are numbers of ``dtype``."""
    shape = (pages, LAYERS, heads, page_tokens, 2 * head_size)
    if dtype == torch.float8_e4m3fn:
        arena = torch.randint(0, 120, shape, dtype=torch.uint8, device=device).view(dtype)
    else:
        arena = torch.empty(shape, dtype=dtype, device=device).normal_()
    return arena[:, 1].transpose(1, 2).split(head_size, dim=-1)


def attending(
    lengths: list[int],
    queries: list[int],
    page_tokens: int,
    device,
    *,
    heads: tuple[int, int] = (32, 8),
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    label: str = "",
) -> Workload:
    """Attend in a batch of requests with these lengths and numbers of queries."""
    cache_dtype = cache_dtype or dtype
    query_heads, kv_heads = heads
    counts = [-(-length // page_tokens) for length in lengths]
    total = sum(counts)
    keys, values = _kv_layer(total + 1, kv_heads, page_tokens, head_size, cache_dtype, device)
    host_pages = _table(total + 1, 2)
    pages = _on(device, host_pages)
    table = torch.zeros(len(lengths), max(counts), dtype=I32)
    handles = 1 + torch.randperm(total)
    begin = 0
    for row, count in enumerate(counts):
        table[row, :count] = handles[begin : begin + count]
        begin += count
    physical = host_pages.entries[table.long()].to(device)
    table = table.to(device)
    query = torch.randn(sum(queries), query_heads, head_size, device=device).to(dtype)
    out = torch.full_like(query, float("nan"))
    is_fp8 = cache_dtype == torch.float8_e4m3fn
    arguments = {
        "query": query,
        "key_cache": keys,
        "value_cache": values,
        "seq_lens": torch.tensor(lengths, dtype=I32, device=device),
        "query_start_loc": _starts(queries, device),
        "scale": head_size**-0.5,
        "softcap": softcap,
    }
    if is_fp8:
        one = torch.full((1,), 0.02, device=device)
        arguments |= {"k_scale": one, "v_scale": one}
    workspace = torch.empty(
        attention.workspace_size(len(lengths), query_heads, kv_heads, head_size),
        device=device,
    )

    def run(block_table=table, pages: PageTable | None = pages):
        attention.paged_attention(
            out, **arguments, block_table=block_table, pages=pages, max_query_len=max(queries),
            workspace=workspace,
        )  # fmt: skip

    def check() -> float:
        out.fill_(float("nan"))
        run()
        wanted = torch.empty(query.shape, dtype=torch.float64)
        host = _to_cpu(arguments | {"block_table": table, "pages": pages})
        kv_reference.paged_attention(wanted, **host)
        return error(out, wanted, dtype)

    tokens, size = sum(lengths), keys.element_size()
    pairs = sum(q * (n - q) + q * (q + 1) // 2 for n, q in zip(lengths, queries, strict=True))
    kind = label or f"{len(lengths)} requests"
    name = f"attention {kind}, pages of {page_tokens}, {str(cache_dtype).removeprefix('torch.')}"
    return Workload(
        name,
        run,
        moved=2 * tokens * kv_heads * head_size * size + 2 * query.numel() * query.element_size(),
        operations=4 * pairs * query_heads * head_size,
        identity=lambda: run(physical, None),
        check=check,
        inputs=arguments
        | {"table": physical, "max_queries": max(queries), "max_length": max(lengths)},
        stock=None if is_fp8 else "attention",
    )


def writing(tokens: int, page_tokens: int, device, *, dtype=torch.bfloat16, cache_dtype=None):
    """Write keys and values of ``tokens`` tokens."""
    cache_dtype = cache_dtype or dtype
    heads, head_size = 8, 128
    count = -(-tokens // page_tokens)
    keys, values = _kv_layer(count + 1, heads, page_tokens, head_size, cache_dtype, device)
    host_pages = _table(count + 1, 2)
    pages = _on(device, host_pages)
    new = torch.randn(2, tokens, heads, head_size, device=device).to(dtype)
    handle = (1 + torch.randperm(count)).repeat_interleave(page_tokens)[:tokens]
    offset = torch.arange(tokens) % page_tokens
    slots = (handle * page_tokens + offset).to(device)
    place = host_pages.entries[handle].long()
    physical = (place * page_tokens + offset).to(device)
    scales = {}
    if cache_dtype == torch.float8_e4m3fn:
        one = torch.full((1,), 0.02, device=device)
        scales = {"k_scale": one, "v_scale": one}

    def run(slots=slots, pages: PageTable | None = pages):
        kv_write.kv_write(*new, keys, values, slots, pages=pages, **scales)

    def check() -> float:
        run()
        host = [keys.cpu().clone(), values.cpu().clone()]
        kv_reference.kv_write(*new.cpu(), *host, physical.cpu(), **_to_cpu(scales))
        same = (torch.equal(a.cpu().view(torch.uint8), b.view(torch.uint8))
                for a, b in zip((keys, values), host, strict=True))  # fmt: skip
        return 0.0 if all(same) else float("inf")

    return Workload(
        f"KV write {tokens} tokens, {str(cache_dtype).removeprefix('torch.')}",
        run,
        moved=new.numel() * (new.element_size() + keys.element_size()),
        identity=lambda: run(physical, None),
        check=check,
        inputs={"key": new[0], "value": new[1], "keys": keys, "values": values, "slots": physical},
        stock=None if scales else "kv_write",
    )


def _blocks(requests: int, device) -> tuple[PageTable, torch.Tensor, torch.Tensor]:
    """Return a page table, SSM handles of the requests, and their physical blocks."""
    pages = _table(2, requests + 1)
    ids = 1 + torch.randperm(requests)
    physical = pages.entries[2:][ids]
    return _on(device, pages), (SSM_TAG + ids).to(I32).to(device), physical.to(I32).to(device)


def updating(
    requests: int, heads: int, dim: int, n: int, device, *, dtype=torch.bfloat16, state_dtype=None
) -> Workload:
    """One decode step: Mamba-1 if there is one head, else Mamba-2."""
    state_dtype = state_dtype or dtype
    pages, handles, physical = _blocks(requests, device)
    states = torch.randn(requests + 1, LAYERS, heads, dim, n, device=device).to(state_dtype)[:, 1]
    random = torch.Generator().manual_seed(1)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=random).to(dtype).to(device)

    mamba2 = heads > 1
    arguments = {
        "x": draw(requests, heads, dim),
        "dt": draw(requests, heads, 1).expand(-1, -1, dim) if mamba2 else draw(requests, 1, dim),
        "A": -torch.rand(heads, 1 if mamba2 else dim, 1 if mamba2 else n, device=device) - 0.1,
        "B": draw(requests, 8 if mamba2 else 1, n),
        "C": draw(requests, 8 if mamba2 else 1, n),
        "D": draw(heads, 1 if mamba2 else dim, dtype=torch.float32).expand(heads, dim),
        "z": None if mamba2 else draw(requests, 1, dim),
        "dt_bias": draw(heads, 1 if mamba2 else dim, dtype=torch.float32).expand(heads, dim),
    }
    arguments["A"] = arguments["A"].expand(heads, dim, n)
    out = torch.empty_like(arguments["x"])

    def run(handles=handles, pages: PageTable | None = pages):
        state_update.selective_state_update(out, states, handles, **arguments, pages=pages)

    def check() -> float:
        out.fill_(float("nan"))
        host = _to_cpu(arguments | {"states": states, "handles": physical})
        host["states"] = host["states"].double()
        wanted = torch.empty(out.shape, dtype=torch.float64)
        ssm_reference.selective_state_update(wanted, **host)
        run()
        return max(error(out, wanted, dtype), error(states, host["states"], state_dtype))

    cells = requests * heads * dim * n
    rows = sum(t.numel() for t in (out, arguments["x"], arguments["B"], arguments["C"]))
    rows += requests * heads if mamba2 else 2 * arguments["dt"].numel()
    state_name = str(state_dtype).removeprefix("torch.")
    return Workload(
        f"state update {requests} x {heads} x {dim} x {n}, {state_name} states",
        run,
        moved=2 * cells * states.element_size() + rows * out.element_size(),
        identity=lambda: run(physical, None),
        check=check,
        inputs=arguments | {"states": states, "physical": physical},
        stock="state_update",
    )


def convolving(lengths: list[int], dim: int, device, *, dtype=torch.bfloat16) -> Workload:
    """Causal conv1d of width 4; requests of one token each take the update."""
    requests, rows, width = len(lengths), sum(lengths), 4
    pages, handles, physical = _blocks(requests, device)
    states = torch.randn(requests + 1, LAYERS, width - 1, dim, device=device).to(dtype)
    states = states[:, 1].transpose(1, 2)
    x, weight, bias = (
        torch.randn(*shape, device=device).to(dtype)
        for shape in ((rows, dim), (dim, width), (dim,))
    )
    starts = _starts(lengths, device)
    has_initial = torch.ones(requests, dtype=torch.bool, device=device)
    out = torch.empty_like(x)
    update = max(lengths) == 1

    def run(handles=handles, pages: PageTable | None = pages):
        if update:
            conv1d.causal_conv1d_update(out, states, handles, x, weight, bias, pages=pages)
        else:
            conv1d.causal_conv1d(
                out, states, handles, starts, has_initial, x, weight, bias, pages=pages
            )

    def check() -> float:
        out.fill_(float("nan"))
        wanted_states, wanted = states.cpu().double(), torch.empty(rows, dim, dtype=torch.float64)
        ssm_reference.causal_conv1d(
            wanted, wanted_states, physical.cpu(), starts.cpu(), None, x.cpu(), weight.cpu(),
            bias.cpu(),
        )  # fmt: skip
        run()
        return max(error(out, wanted, dtype), error(states, wanted_states, dtype))

    kind = "update" if update else "prefill"
    return Workload(
        f"conv1d {kind} {rows} tokens x {dim}",
        run,
        moved=2 * out.numel() * out.element_size() + 2 * requests * 3 * dim * out.element_size(),
        identity=lambda: run(physical, None),
        check=check,
        inputs={"x": x, "weight": weight, "bias": bias, "states": states, "physical": physical},
        stock="conv1d_update" if update else None,
    )


def scanning(lengths: list[int], dim: int, n: int, device, *, dtype=torch.bfloat16) -> Workload:
    """Mamba-1's selective scan of a prefill."""
    requests, rows = len(lengths), sum(lengths)
    pages, handles, physical = _blocks(requests, device)
    states = torch.randn(requests + 1, LAYERS, dim, n, device=device).to(dtype)[:, 1]

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, device=device).to(dtype)

    arguments = {
        "x": draw(rows, dim),
        "dt": draw(rows, dim),
        "A": -torch.rand(dim, n, device=device) - 0.1,
        "B": draw(rows, n),
        "C": draw(rows, n),
        "D": draw(dim, dtype=torch.float32),
        "z": draw(rows, dim),
        "dt_bias": draw(dim, dtype=torch.float32),
    }
    starts = _starts(lengths, device)
    has_initial = torch.ones(requests, dtype=torch.bool, device=device)
    out = torch.empty(rows, dim, dtype=dtype, device=device)

    def run(handles=handles, pages: PageTable | None = pages):
        selective_scan.selective_scan(
            out, states, handles, starts, has_initial, **arguments, pages=pages
        )

    def check() -> float:
        out.fill_(float("nan"))
        per_head = {
            name: t.unsqueeze(0 if name in ("A", "D", "dt_bias") else 1)
            for name, t in _to_cpu(arguments).items()
        }
        wanted = torch.empty(rows, 1, dim, dtype=torch.float64)
        wanted_states = states.cpu().double()[:, None]
        ssm_reference.selective_scan(
            wanted, wanted_states, physical.cpu(), starts.cpu(), None, **per_head
        )
        run()
        return max(error(out, wanted[:, 0], dtype), error(states, wanted_states[:, 0], dtype))

    return Workload(
        f"selective scan {rows} tokens x {dim} x {n}",
        run,
        moved=4 * out.numel() * out.element_size(),
        identity=lambda: run(physical, None),
        check=check,
        inputs=arguments | {
            "states": states, "physical": physical, "starts": starts, "has_initial": has_initial,
        },
        stock="selective_scan",
    )  # fmt: skip
