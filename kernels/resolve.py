"""Resolve once: block tables, slot mappings and state indices of a step in one launch.

Stock vLLM gathers the block tables of a step's requests in one launch and computes slot mappings in
a second one. This kernel does both and, on the way, replaces handles by physical indices and picks
the SSM state of every request, so resolving costs no launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from avmp_kernels.pages import PageTable, resolve_kv, resolve_ssm, table_args

PAD_SLOT = -1
_BLOCK = 1024


@triton.jit
def _as_table(pointers, index):
    """Load a pointer from a table of addresses (uint64) as a pointer to int32."""
    pointer = tl.load(pointers + index).to(tl.pointer_type(tl.int32))
    return tl.multiple_of(pointer, 16)


@triton.jit
def _look_up(entries, handle, num_kv, num_ssm, is_ssm, mask, RESOLVE: tl.constexpr):
    if RESOLVE:
        if is_ssm:
            index = resolve_ssm(entries, handle, num_kv, num_ssm, mask)
        else:
            index = resolve_kv(entries, handle, num_kv, mask)
    else:
        index = handle
    return index


@triton.jit(do_not_specialize=["num_requests", "num_rows", "num_kv", "num_ssm"])
def _resolve_kernel(
    source_pointers,  # [groups] uint64
    target_pointers,  # [groups] uint64
    widths,  # [groups] int32, columns of a table
    page_tokens,  # [groups] int32
    is_ssm,  # [groups] int8
    has_slots,  # [groups] int8
    state_tokens,  # [groups] int32
    num_pages,  # [groups, max_requests] int32
    num_pages_stride,
    request_rows,  # [num_requests] int32
    query_start_loc,  # [num_requests + 1] int32
    positions,  # [tokens] int64
    seq_lens,  # [num_requests] int32
    entries,
    num_kv,
    num_ssm,
    slots,  # [groups, max_tokens] int64
    slots_stride,
    states,  # [groups, max_requests, state_columns] int32
    states_stride,
    num_requests,
    num_rows,
    max_tokens,
    STATE_COLUMNS: tl.constexpr,
    STATE_COLUMNS_PADDED: tl.constexpr,
    RESOLVE: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    group = tl.program_id(1)
    slots_row = slots + group.to(tl.int64) * slots_stride
    step = tl.arange(0, BLOCK)
    if row == num_rows:
        # The padding after the last token, up to the end of the persistent buffer.
        for start in tl.range(tl.load(query_start_loc + num_requests), max_tokens, BLOCK):
            token = start + step
            tl.store(slots_row + token, PAD, mask=token < max_tokens)
        return

    width = tl.load(widths + group)
    target = _as_table(target_pointers, group) + row.to(tl.int64) * width
    column = tl.arange(0, STATE_COLUMNS_PADDED)
    states_row = states + group.to(tl.int64) * states_stride + row * STATE_COLUMNS + column
    request = tl.load(request_rows + row, mask=row < num_requests, other=-1)
    if request < 0:
        # A padding row, or a dummy request that owns no pages.
        for start in tl.range(0, width, BLOCK):
            tl.store(target + start + step, 0, mask=start + step < width)
        tl.store(states_row, 0, mask=column < STATE_COLUMNS)
        if row < num_requests:
            last = tl.load(query_start_loc + row + 1)
            for start in tl.range(tl.load(query_start_loc + row), last, BLOCK):
                tl.store(slots_row + start + step, PAD, mask=start + step < last)
        return

    ssm = tl.load(is_ssm + group) != 0
    source = _as_table(source_pointers, group) + request.to(tl.int64) * width
    count = tl.load(num_pages + group * num_pages_stride + request)
    for start in tl.range(0, count, BLOCK):
        live = start + step < count
        handle = tl.load(source + start + step, mask=live, other=0)
        index = _look_up(entries, handle, num_kv, num_ssm, ssm, live, RESOLVE)
        tl.store(target + start + step, index, mask=live)

    if ssm:
        # The state that the last token of this step belongs to; the first one without spacing.
        tokens = tl.load(state_tokens + group)
        at = column
        if tokens > 0:
            at += tl.maximum(tl.load(seq_lens + row) - 1, 0) // tokens
        live = (column < STATE_COLUMNS) & (at < count)
        handle = tl.load(source + at, mask=live, other=0)
        index = _look_up(entries, handle, num_kv, num_ssm, ssm, live, RESOLVE)
        tl.store(states_row, tl.where(live, index, 0), mask=column < STATE_COLUMNS)
    else:
        tl.store(states_row, 0, mask=column < STATE_COLUMNS)

    last = tl.load(query_start_loc + row + 1)
    if tl.load(has_slots + group) != 0:
        size = tl.load(page_tokens + group)
        for start in tl.range(tl.load(query_start_loc + row), last, BLOCK):
            token = start + step
            position = tl.load(positions + token, mask=token < last, other=0)
            page = (position // size).to(tl.int32)
            live = (token < last) & (page < count)
            handle = tl.load(source + page, mask=live, other=0)
            index = _look_up(entries, handle, num_kv, num_ssm, ssm, live, RESOLVE)
            slot = index.to(tl.int64) * size + position % size
            tl.store(slots_row + token, tl.where(live, slot, PAD), mask=token < last)
    else:
        for start in tl.range(tl.load(query_start_loc + row), last, BLOCK):
            tl.store(slots_row + start + step, PAD, mask=start + step < last)


class Resolver:
    """The persistent buffers of one runner, and the launch that fills them.

    The buffers keep their addresses, so captured CUDA graphs may read them. Nothing here waits for
    the device, and the launch shape depends on the padded batch size only.
    """

    def __init__(
        self,
        tables: Sequence[torch.Tensor],
        page_tokens: Sequence[int],
        is_ssm: Sequence[bool],
        max_tokens: int,
        *,
        has_slots: Sequence[bool] | None = None,
        state_tokens: Sequence[int] | None = None,
        state_columns: int = 1,
    ) -> None:
        """Set up the buffers.

        Args:
            tables: One block table a group: int32 ``[max_requests, pages]``, contiguous, persistent
                (its address is taken here), holding handles.
            page_tokens: Tokens a page (or SSM block) of each group.
            is_ssm: Which groups hold SSM blocks.
            max_tokens: Upper bound of tokens in a step, padding included.
            has_slots: Which groups want a slot mapping; default: those that hold KV pages.
            state_tokens: Tokens between two states of an SSM group; 0 (the default) means that
                a request has one state, in column 0.
            state_columns: State indices a request: 1, and one more a speculative token.

        Raises:
            ValueError: If the tables or the lists do not fit one another.
        """
        groups = len(tables)
        has_slots = [not ssm for ssm in is_ssm] if has_slots is None else has_slots
        state_tokens = [0] * groups if state_tokens is None else state_tokens
        for name, given in (
            ("page_tokens", page_tokens),
            ("is_ssm", is_ssm),
            ("has_slots", has_slots),
            ("state_tokens", state_tokens),
        ):
            if len(given) != groups:
                raise ValueError(f"{name} has {len(given)} entries for {groups} block tables")
        for table in tables:
            if table.dtype != torch.int32 or not table.is_contiguous():
                raise ValueError("block tables must be contiguous int32 tensors")
            if table.shape[0] != tables[0].shape[0]:
                raise ValueError("block tables must have the same number of rows")
        device = tables[0].device

        def words(values: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
            return torch.tensor(list(values), dtype=dtype, device=device)

        self.tables = list(tables)
        self.max_requests = tables[0].shape[0]
        #: One int32 ``[max_requests, pages]`` a group: physical block tables in batch order.
        self.block_tables = [torch.zeros_like(table) for table in tables]
        #: int64 ``[groups, max_tokens]``: ``physical page * page_tokens + offset``, or -1.
        self.slot_mappings = torch.full(
            (groups, max_tokens), PAD_SLOT, dtype=torch.int64, device=device
        )
        #: int32 ``[groups, max_requests, state_columns]``: physical SSM blocks, 0 for KV groups.
        self.state_indices = torch.zeros(
            (groups, self.max_requests, state_columns), dtype=torch.int32, device=device
        )
        self._sources = words([t.data_ptr() for t in self.tables], torch.uint64)
        self._targets = words([t.data_ptr() for t in self.block_tables], torch.uint64)
        self._widths = words([t.shape[1] for t in tables], torch.int32)
        self._page_tokens = words(page_tokens, torch.int32)
        self._is_ssm = words([int(s) for s in is_ssm], torch.int8)
        self._has_slots = words([int(s) for s in has_slots], torch.int8)
        self._state_tokens = words(state_tokens, torch.int32)

    def resolve(
        self,
        request_rows: torch.Tensor,
        query_start_loc: torch.Tensor,
        positions: torch.Tensor,
        seq_lens: torch.Tensor,
        num_pages: torch.Tensor,
        pages: PageTable | None,
        num_rows: int | None = None,
    ) -> None:
        """Fill ``block_tables``, ``slot_mappings`` and ``state_indices`` for one step.

        A row beyond the requests, and a request whose row is -1, get null pages everywhere and -1
        for its slots. Columns of a live row beyond its number of pages are left as they are.

        Args:
            request_rows: int32 ``[requests]``: the row of the persistent tables of each request.
            query_start_loc: int32 ``[requests + 1]``: first token of each request, then the end.
            positions: int64 ``[tokens]``: position of each token in its request.
            seq_lens: int32 ``[requests]``: tokens of each request after this step.
            num_pages: int32 ``[groups, max_requests]``: live columns of every table row.
            pages: The page table; None copies the tables as they are, for kernels that resolve by
                themselves (a slot then is ``handle * page_tokens + offset``).
            num_rows: Rows to write, padding included; default: the requests alone.
        """
        num_requests = request_rows.shape[0]
        num_rows = num_requests if num_rows is None else num_rows
        if not num_requests <= num_rows <= self.max_requests:
            raise ValueError(
                f"{num_rows} rows for {num_requests} requests; the buffers hold {self.max_requests}"
            )
        entries, num_kv, num_ssm = table_args(pages, self._widths)
        columns = self.state_indices.shape[2]
        _resolve_kernel[(num_rows + 1, len(self.tables))](
            self._sources,
            self._targets,
            self._widths,
            self._page_tokens,
            self._is_ssm,
            self._has_slots,
            self._state_tokens,
            num_pages,
            num_pages.stride(0),
            request_rows,
            query_start_loc,
            positions,
            seq_lens,
            entries,
            num_kv,
            num_ssm,
            self.slot_mappings,
            self.slot_mappings.stride(0),
            self.state_indices,
            self.state_indices.stride(0),
            num_requests,
            num_rows,
            self.slot_mappings.shape[1],
            STATE_COLUMNS=columns,
            STATE_COLUMNS_PADDED=triton.next_power_of_2(columns),
            RESOLVE=pages is not None,
            PAD=PAD_SLOT,
            BLOCK=_BLOCK,
            num_warps=4,
        )
