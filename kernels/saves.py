"""States that kernels save inside of the rows that they walk over.

A prefix cache keeps the state at some position of a prompt. A kernel that passes the position
writes it to a block of its own, so that the prompt need not be computed in two parts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ChunkSaves(NamedTuple):
    """What a batch saves.

    Attributes:
        tokens: int32 ``[requests, most of one request]``, contiguous: rows of the request that each
            state covers, ascending, fewer than it has; 0 for none.
        targets: As ``tokens``: the SSM handle of the block that gets the state, or its physical
            index. No two are the same, and none is the request's own. Null ones get nothing.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
