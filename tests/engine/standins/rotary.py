"""Rotary embeddings of ``[tokens, heads, channels]``, which vLLM's CPU kernel takes for 2-D."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from vllm import _custom_ops

_STOCK = _custom_ops.rotary_embedding


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Rotate query and key in place, by way of copies with all heads in one dimension."""
    whole = torch.contiguous_format
    flat = [
        None if each is None else each.flatten(1).clone(memory_format=whole)
        for each in (query, key)
    ]
    _STOCK(positions, *flat, *args, **kwargs)
    for each, rotated in zip((query, key), flat, strict=True):
        if each is not None:
            each.copy_(rotated.view(each.shape))


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Take the place of the kernel."""
    with mock.patch.object(_custom_ops, "rotary_embedding", rotary_embedding):
        yield
