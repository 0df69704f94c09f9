"""Handles to physical indices in Model Runner V2.

What the scheduler sends is staged into private tables of handles. Once a step, one kernel gathers
the batch's rows and computes its slot mapping, as vLLM does in two launches, and resolves the
handles on the way. The tables that vLLM's kernels and captured graphs read are physical, and keep
their addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from avmp_kernels.resolve import Resolver
from vllm.v1.worker.gpu.block_table import BlockTables

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.core import Kind

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.input_batch import InputBatch


class ResolvedBlockTables(BlockTables):
    """vLLM's block tables, one group a pool, filled with physical indices.

    Args:
        stock: Tables of the sizes that vLLM chose; only their sizes are used.
        kinds: Pool of each cache group.
        page_table: The worker's page table.
        keep_rows: Whether to keep each request's physical SSM blocks by request slot as well as by
            batch row. The state copies of prefix caching read them so.
    """

    def __init__(
        self,
        stock: BlockTables,
        kinds: Sequence[Kind],
        page_table: DevicePageTable,
        keep_rows: bool,
    ) -> None:
        super().__init__(
            block_sizes=stock.block_sizes,
            max_num_reqs=stock.max_num_reqs,
            max_num_batched_tokens=stock.max_num_batched_tokens,
            max_num_blocks_per_group=[table.gpu.shape[1] for table in stock.block_tables],
            device=stock.device,
            slot_mapping_enabled=stock._slot_mapping_enabled,
        )
        assert stock.cp_size == 1, "context parallelism is refused at start-up"
        assert self.fused_writer is not None, "an arena has two groups"
        self._page_table = page_table
        self._kept = [group for group, kind in enumerate(kinds) if keep_rows and kind is Kind.SSM]
        handles = [table.gpu for table in self.block_tables]
        self._handle_ptrs = self.block_table_ptrs
        self._resolver = Resolver(
            handles,
            self.block_sizes,
            [kind is Kind.SSM for kind in kinds],
            self.max_num_batched_tokens,
            has_slots=self._slot_mapping_enabled,
        )
        # From here on everything under vLLM's names is physical. By request slot that is kept up
        # for the SSM group alone, where it has a reader; the other table reads as null pages.
        for table in self.block_tables:
            table.gpu = torch.zeros_like(table.gpu)
        self.input_block_tables = self._resolver.block_tables
        self.slot_mappings = self._resolver.slot_mappings
        self.init_block_table_layout_tensors()

    def apply_staged_writes(self) -> None:
        """Write the staged handles into the private tables: one launch, as in vLLM."""
        assert self.fused_writer is not None
        self.fused_writer.apply(self.block_tables, self._handle_ptrs, self.block_table_strides)
        self.num_blocks.copy_to_uva()

    def resolve(self, batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Fill the physical tables for one step.

        Args:
            batch: The step's requests and tokens.

        Returns:
            For each group int32 ``[rows, pages]``, padding rows null; and the slot mapping, int64
            ``[groups, tokens]``, padding -1.
        """
        self._resolver.resolve(
            batch.idx_mapping,
            batch.query_start_loc,
            batch.positions,
            batch.seq_lens,
            self.num_blocks.gpu,
            self._page_table.resident,
            num_rows=batch.num_reqs_after_padding,
        )
        for group in self._kept:
            rows = self.input_block_tables[group][: batch.num_reqs]
            self.block_tables[group].gpu.index_copy_(0, batch.idx_mapping, rows)
        return (
            tuple(table[: batch.num_reqs_after_padding] for table in self.input_block_tables),
            self.slot_mappings[:, : batch.num_tokens_after_padding],
        )

    def gather_block_tables(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered: only context parallelism and speculative decoding call it by themselves."""
        raise NotImplementedError("AVMP gathers block tables in resolve()")

    def compute_slot_mappings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not offered: only context parallelism and speculative decoding call it by themselves."""
        raise NotImplementedError("AVMP computes slot mappings in resolve()")
