"""Handles to what kernels read, in Model Runner V2.

What the scheduler sends is staged into private tables of handles. Once a step, one kernel gathers
the batch's rows and computes its slot mapping, as vLLM does in two launches. On the way it resolves
the handles, or leaves them where the group's kernels resolve them by themselves. The tables that it
fills keep their addresses, as captured graphs need.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from avmp_kernels.resolve import PAD_SLOT, Resolver
from vllm.v1.worker.gpu.block_table import BlockTables

from avmp_vllm.backing.device_page_table import DevicePageTable
from avmp_vllm.core import Kind

if TYPE_CHECKING:
    from avmp_kernels.pages import PageTable as KernelPageTable
    from vllm.v1.worker.gpu.input_batch import InputBatch


class _Launch(NamedTuple):
    """One launch a step: its buffers, the page table (None keeps handles), and its groups."""

    resolver: Resolver
    pages: KernelPageTable | None
    groups: slice


class ArenaBlockTables(BlockTables):
    """vLLM's block tables, of any number of groups, with what the group's kernels read.

    Args:
        stock: Tables of the sizes that vLLM chose; only their sizes are used.
        kinds: Pool of each cache group.
        page_table: The worker's page table.
        by_handle: Of each group, whether its kernels resolve handles themselves.
        keep_rows: Of each group, whether to keep each request's physical pages by request slot as
            well as by batch row. The state copies of prefix caching read them so, and drafters.

    Attributes:
        kinds: Pool of each cache group.
        handles: int32 ``[request slots, pages]`` for each group: handles, as vLLM staged them.
    """

    def __init__(
        self,
        stock: BlockTables,
        kinds: Sequence[Kind],
        page_table: DevicePageTable,
        by_handle: Sequence[bool],
        keep_rows: Sequence[bool],
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
        assert self.fused_writer is not None, "an arena has a group for each pool"
        self.kinds = kinds
        self.handles = [table.gpu for table in self.block_tables]
        self._handle_ptrs = self.block_table_ptrs
        self.slot_mappings.fill_(PAD_SLOT)
        self._launches: list[_Launch] = []
        for resolved in (True, False):
            groups = [group for group, by in enumerate(by_handle) if by is not resolved]
            if groups:
                pages = page_table.resident if resolved else None
                launch = self._launch(groups, pages, self._slot_mapping_enabled)
                launch.resolver.slot_mappings = self.slot_mappings[groups[0] : groups[-1] + 1]
                for group, table in zip(groups, launch.resolver.block_tables, strict=True):
                    self.input_block_tables[group] = table
                self._launches.append(launch)
        # By request slot, everything under vLLM's names is physical. It is kept up where it has a
        # reader; the other tables read as null pages.
        for table in self.block_tables:
            table.gpu = torch.zeros_like(table.gpu)
        self._rows: list[tuple[int, torch.Tensor]] = []
        for group, keep in enumerate(keep_rows):
            if not keep:
                continue
            rows = self.input_block_tables[group]
            if by_handle[group]:
                launch = self._launch([group], page_table.resident, [False] * len(kinds))
                self._launches.append(launch)
                (rows,) = launch.resolver.block_tables
            self._rows.append((group, rows))
        self._has_all_rows = all(keep_rows)
        self.init_block_table_layout_tensors()

    def _launch(
        self, groups: list[int], pages: KernelPageTable | None, has_slots: Sequence[bool]
    ) -> _Launch:
        """Make the launch that fills the tables of neighbouring groups."""
        resolver = Resolver(
            [self.handles[group] for group in groups],
            [self.block_sizes[group] for group in groups],
            [self.kinds[group] is Kind.SSM for group in groups],
            self.max_num_batched_tokens,
            has_slots=[has_slots[group] for group in groups],
        )
        return _Launch(resolver, pages, slice(groups[0], groups[-1] + 1))

    def apply_staged_writes(self) -> None:
        """Write the staged handles into the private tables: one launch, as in vLLM."""
        assert self.fused_writer is not None
        self.fused_writer.apply(self.block_tables, self._handle_ptrs, self.block_table_strides)
        self.num_blocks.copy_to_uva()

    def resolve(self, batch: InputBatch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Fill the batch's tables for one step.

        Args:
            batch: The step's requests and tokens.

        Returns:
            For each group int32 ``[rows, pages]``, padding rows null; and the slot mapping, int64
            ``[groups, tokens]``, padding -1.
        """
        for launch in self._launches:
            launch.resolver.resolve(
                batch.idx_mapping,
                batch.query_start_loc,
                batch.positions,
                batch.seq_lens,
                self.num_blocks.gpu[launch.groups],
                launch.pages,
                num_rows=batch.num_reqs_after_padding,
            )
        for group, rows in self._rows:
            self.block_tables[group].gpu.index_copy_(0, batch.idx_mapping, rows[: batch.num_reqs])
        return (
            tuple(table[: batch.num_reqs_after_padding] for table in self.input_block_tables),
            self.slot_mappings[:, : batch.num_tokens_after_padding],
        )

    def gather_block_tables(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """For drafters, which call it between their steps; the batch's are made in ``resolve``.

        Raises:
            NotImplementedError: Physical pages are not kept by request slot.
        """
        if not self._has_all_rows:
            raise NotImplementedError("AVMP gathers block tables in resolve()")
        return super().gather_block_tables(*args, **kwargs)

    def compute_slot_mappings(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """For drafters, as above.

        Raises:
            NotImplementedError: Physical pages are not kept by request slot.
        """
        if not self._has_all_rows:
            raise NotImplementedError("AVMP computes slot mappings in resolve()")
        return super().compute_slot_mappings(*args, **kwargs)
