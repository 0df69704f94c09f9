"""Debug mode of Model Runner V2: the handles of a batch, checked on the device before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_kernels.check import HandleCheck

from avmp_vllm.core import Geometry, InvariantViolation, Kind

if TYPE_CHECKING:
    from avmp_kernels.pages import PageTable
    from vllm.v1.worker.gpu.input_batch import InputBatch

    from avmp_vllm.engine.worker.v2.block_tables import ArenaBlockTables


class BatchCheck:
    """Finds handles that name no page, while kernels would silently take the null page.

    Args:
        tables: The runner's block tables.
        pages: The page table on the device.
        geometry: Numbers of pages that the arena's views hold.
    """

    def __init__(self, tables: ArenaBlockTables, pages: PageTable, geometry: Geometry) -> None:
        self._tables = tables
        self._pages = pages
        self._limits = {Kind.KV: geometry.pages, Kind.SSM: geometry.blocks}
        self._check = HandleCheck(len(tables.kinds), tables.device)

    def check(self, batch: InputBatch) -> None:
        """Check the block tables of a step's requests. Waits for the device.

        Raises:
            InvariantViolation: Naming the first bad handle, its request and what is wrong with it.
        """
        rows = batch.idx_mapping
        for group, kind in enumerate(self._tables.kinds):
            self._check.check(
                group,
                self._tables.handles[group][rows],
                self._tables.num_blocks.gpu[group][rows],
                kind is Kind.SSM,
                self._pages,
                self._limits[kind],
            )
        try:
            self._check.raise_if_bad(batch.req_ids)
        except ValueError as error:
            raise InvariantViolation(str(error)) from None
