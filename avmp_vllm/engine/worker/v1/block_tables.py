"""Handles to physical indices in Model Runner V1.

The runner's block tables hold what the scheduler sent: handles. Once a step, after the move plan is
applied, the rows in use are resolved into the device tensors that kernels read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import Kind

if TYPE_CHECKING:
    from vllm.v1.utils import CpuGpuBuffer
    from vllm.v1.worker.block_table import BlockTable
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

#: Attribute of Runner V1's copy buffers that says how to resolve the ids they are filled from.
PAGE_TABLE = "avmp_page_table"


class HandleBuffer:
    """Takes the place of the buffer inside a ``BlockTable``.

    Not a ``CpuGpuBuffer``, so that the CPU runner does not make its two halves one.

    Args:
        stock: The buffer to replace; its host half keeps the handles.
        table: The block table it belongs to.
        page_table: The worker's page table.
        kind: Which pool's handles it holds.
    """

    def __init__(
        self, stock: CpuGpuBuffer, table: BlockTable, page_table: PageTable, kind: Kind
    ) -> None:
        self.cpu, self.np = stock.cpu, stock.np
        device = stock.gpu.device
        self.gpu = torch.zeros_like(stock.cpu, device=device)
        on_host = device.type == "cpu"
        # Where the resolved rows are built: the device tensor itself if the host can write it.
        self._staging = self.gpu if on_host else torch.zeros_like(stock.cpu).pin_memory()
        self._resolved = self._staging.numpy()
        self._table, self._page_table, self._kind = table, page_table, kind
        self._width = 0

    def copy_to_gpu(self, rows: int | None = None) -> torch.Tensor:
        """Resolve the first rows, as wide as any of them is or was."""
        rows = len(self.np) if rows is None else rows
        lengths = self._table.num_blocks_per_row[:rows]
        width = int(lengths.max()) if rows else 0
        # Columns that earlier rows used are resolved again, so that no old page number stays.
        width, self._width = max(width, self._width), width
        part = (slice(rows), slice(width))
        self._page_table.resolve(self._kind, self.np[part], self._resolved[part])
        if self._staging is not self.gpu:
            self.gpu[part].copy_(self._staging[part], non_blocking=True)
        return self.gpu[:rows]


class ResolvedRow:
    """A request's block ids, resolved as they are read."""

    def __init__(self, handles: list[int], page_table: PageTable) -> None:
        self._handles, self._page_table = handles, page_table

    def __getitem__(self, index: int) -> int:
        return self._page_table.physical(self._handles[index])

    def __len__(self) -> int:
        return len(self._handles)


class ResolvedRequest:
    """What ``collect_mamba_copy_meta`` reads of a request."""

    def __init__(self, request: CachedRequestState, page_table: PageTable) -> None:
        self.block_ids = [ResolvedRow(handles, page_table) for handles in request.block_ids]


def collect_mamba_copy_meta(stock: Callable[..., None]) -> Callable[..., None]:
    """Wrap ``mamba_utils.collect_mamba_copy_meta``: copy between physical blocks."""

    def wrapper(
        copy_bufs: Any,
        kv_cache_config: Any,
        mamba_state_copy_funcs: Any,
        mamba_group_ids: list[int],
        src_block_idx: int,
        dest_block_idx: int,
        accept_token_bias: int,
        req_state: Any,
        forward_context: dict[str, Any],
    ) -> None:
        page_table = getattr(copy_bufs, PAGE_TABLE, None)
        if page_table is not None:
            req_state = ResolvedRequest(req_state, page_table)
        stock(
            copy_bufs,
            kv_cache_config,
            mamba_state_copy_funcs,
            mamba_group_ids,
            src_block_idx,
            dest_block_idx,
            accept_token_bias,
            req_state,
            forward_context,
        )

    return wrapper
