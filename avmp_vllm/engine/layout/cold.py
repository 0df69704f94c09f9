"""Where the values are in a block of states, for what encodes them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

import torch
from vllm.v1.kv_cache_interface import MambaSpec

from avmp_vllm.backing.state_codec import Segment, StateCodec
from avmp_vllm.engine.entry.config import ConfigError, selected

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheTensor

    from avmp_vllm.engine.layout.arena import AVMPCacheConfig


def state_codec(vllm_config: VllmConfig, config: AVMPCacheConfig) -> StateCodec | None:
    """What encodes states that are not in use; None if they stay as they are.

    Raises:
        ConfigError: Two encoded states do not fit into a block.
    """
    options = selected(vllm_config.additional_config)
    if options is None or options.cold_states == "exact":
        return None
    segments = list(_segments(config))
    try:
        return StateCodec(segments, config.own.block_bytes)
    except ValueError as error:
        names = {str(dtype).removeprefix("torch.") for dtype in _dtypes(config)}
        raise ConfigError(
            f"cold_states = {options.cold_states!r}: {error}, with states of "
            f"{' and '.join(sorted(names))}; it is for states of float32: set "
            "--mamba-ssm-cache-dtype float32, or cold_states to 'exact'"
        ) from None


def _states(config: AVMPCacheConfig) -> Iterator[tuple[KVCacheTensor, MambaSpec]]:
    """The tensors of states, each with the spec of its layers."""
    specs = config.stages[config.stage].specs
    for tensor in config.kv_cache_tensors:
        spec = specs[tensor.layers[0]]
        if isinstance(spec, MambaSpec):
            yield tensor, spec


def _dtypes(config: AVMPCacheConfig) -> set[torch.dtype]:
    return {dtype for _, spec in _states(config) for dtype in spec.dtypes}


def _segments(config: AVMPCacheConfig) -> Iterator[Segment]:
    """A segment for each part of the states of each layout."""
    for tensor, spec in _states(config):
        offset = tensor.offset
        for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True):
            nbytes = prod(shape) * dtype.itemsize
            row = shape[-1] if dtype is torch.float32 else 0
            yield Segment(offset, tensor.layer_stride, len(tensor.layers), nbytes, row)
            offset += nbytes
