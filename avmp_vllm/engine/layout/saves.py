"""What the layers of a worker save inside of a step's chunks.

The move plan names each chunk by the block that it leaves its last state in, so that neither the
order of a batch nor the runner matters. Layers on the host look blocks up by physical index; those
whose kernels take handles, on the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer
from vllm.utils.torch_utils import async_tensor_h2d

from avmp_vllm.core import InvariantViolation, Save


class Resolves(Protocol):
    """A page table."""

    def physical(self, handle: int) -> int:
        """Resolve one handle."""


class RowSave(NamedTuple):
    """A state to save, as layers on the host know it.

    Attributes:
        row: Of the batch's prefills.
        tokens: Of the row that the state covers.
        target: Physical block that gets it.
    """

    row: int
    tokens: int
    target: int


class ChunkSaves:
    """The states that one step saves, from its plan to its layers.

    Args:
        page_table: The worker's.
    """

    def __init__(self, page_table: Resolves) -> None:
        self._page_table = page_table
        self._saves: Sequence[Save] = ()
        self._left = False
        # Of the batch that has asked last: its states, and the answer.
        self._batch: torch.Tensor | None = None
        self._rows: list[RowSave] = []
        self._table: tuple[torch.Tensor, torch.Tensor] | None = None

    def bind(self, layers: dict[str, torch.nn.Module]) -> None:
        """Let a model's Mamba-1 layers know where to ask.

        Args:
            layers: By name: those that have a cache.
        """
        for layer in layers.values():
            if isinstance(layer, MambaMixer):
                layer.saves = self

    def begin(self, saves: Sequence[Save]) -> None:
        """A step begins; its relocations are about to be applied."""
        self._saves, self._batch = saves, None
        self._left = bool(saves)

    def end(self) -> None:
        """The step's forward pass has been launched.

        Raises:
            InvariantViolation: No layer has asked, so what is published was never saved.
        """
        left, self._left, self._saves, self._batch = self._left, False, (), None
        if left:
            raise InvariantViolation("a step's states were not saved: no layer has asked for them")

    def of_blocks(self, states: torch.Tensor) -> list[RowSave]:
        """What a batch saves.

        Args:
            states: Integer ``[prefills]`` on the host: the physical blocks that they update.

        Returns:
            By row, and in it by position.

        Raises:
            InvariantViolation: A chunk that is to save a state is not in the batch.
        """
        if not self._saves:
            return []
        if self._batch is not states:
            rows = {block: row for row, block in enumerate(states.tolist())}
            physical = self._page_table.physical
            try:
                self._rows = sorted(
                    RowSave(rows[physical(save.running)], save.tokens, physical(save.target))
                    for save in self._saves
                )
            except KeyError as error:
                raise InvariantViolation(
                    f"the chunk that updates block {error} is to save a state, and is not in the "
                    "batch"
                ) from None
            self._batch, self._left = states, False
        return self._rows

    def of_handles(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a batch saves, on the device, without waiting for it.

        Args:
            states: int32 ``[prefills]``: the handles of the blocks that they update.

        Returns:
            None if nothing, else int32 ``[prefills, most saves of a chunk]`` twice: tokens of the
            chunk that each state covers, ascending, 0 for none; and the handles of its block.
        """
        if not self._saves:
            return None
        if self._batch is not states:
            self._table = _rows_of(self._saves, states)
            self._batch, self._left = states, False
        return self._table


def _rows_of(saves: Iterable[Save], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring saves into the order of a batch's handles."""
    chunks: dict[int, list[Save]] = {}
    for save in saves:
        chunks.setdefault(save.running, []).append(save)
    most = max(map(len, chunks.values()))
    # One row a chunk: its handle, tokens, targets; the last row is for chunks that save nothing.
    table = [
        [handle]
        + [save.tokens for save in chunk]
        + [0] * (most - len(chunk))
        + [save.target for save in chunk]
        + [0] * (most - len(chunk))
        for handle, chunk in chunks.items()
    ]
    table.append([-1] + [0] * (2 * most))
    rows = async_tensor_h2d(table, dtype=torch.int32, device=states.device)
    found = states[:, None] == rows[None, :, 0]
    found[:, -1] = ~found[:, :-1].any(dim=1)
    picked = rows[found.int().argmax(dim=1)]
    return picked[:, 1 : 1 + most].contiguous(), picked[:, 1 + most :].contiguous()
