"""States of fp32 in half their bytes: 12 bits a value, what is not fp32 as it is.

Each row of a state, which is what one channel or one key adds up, has a scale, so that a value is
off by at most a 4,094th of the largest in its row; bf16, by comparison, by a 512th of the value
itself. What convolutions keep is narrower already and a few percent of the bytes. An encoded state
that is decoded and encoded again stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from avmp_vllm.core.cold import HALVES

#: Halves start on this boundary, so that a view of any dtype is aligned (bytes).
ALIGNMENT = 128
#: Largest magnitude of a value, in steps of its row's scale.
STEPS = 2047
_SCALE = torch.float32


@dataclass(frozen=True)
class Segment:
    """A part of the states of some layers that lie at equal distances in a block.

    Attributes:
        offset: Bytes from the block's start to the first layer's part.
        stride: Bytes from one layer to the next.
        layers: How many.
        nbytes: Of one layer's part.
        row: Values that share a scale; 0 for bytes that are kept as they are.
    """

    offset: int
    stride: int
    layers: int
    nbytes: int
    row: int = 0

    @property
    def values(self) -> int:
        """Of fp32, in all layers."""
        return self.layers * self.nbytes // 4

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of its encoded parts: scales, high bits, low bits; or its bytes."""
        if not self.row:
            return (self.layers * self.nbytes,)
        values = self.values
        return values // self.row * _SCALE.itemsize, values, -(-values // 2)

    @property
    def encoded(self) -> int:
        """Bytes of it when it is encoded, in whole words."""
        return sum(-(-size // 4) * 4 for size in self.sizes)


class StateCodec:
    """Encodes blocks of states and decodes them.

    Args:
        segments: Of a block.
        block_bytes: Of a block.

    Raises:
        ValueError: Two encoded states do not fit into a block.
    """

    def __init__(self, segments: Sequence[Segment], block_bytes: int) -> None:
        self.half_bytes = block_bytes // HALVES // ALIGNMENT * ALIGNMENT
        self._segments = tuple(segments)
        encoded = sum(segment.encoded for segment in segments)
        if encoded > self.half_bytes:
            raise ValueError(
                f"an encoded state has {encoded} bytes, and half a block {self.half_bytes}"
            )

    def encode(self, source: torch.Tensor, target: torch.Tensor, half: int) -> None:
        """Encode a block into half of another, or of itself.

        Args:
            source: uint8 bytes of the block, contiguous.
            target: Bytes of the block that is written.
            half: Which half of it.
        """
        parts: list[torch.Tensor] = []
        for segment in self._segments:
            layers = self._layers(source, segment)
            if segment.row:
                parts += _encoded(layers.contiguous().view(torch.float32), segment.row)
            else:
                parts.append(layers.flatten())
        # All of the source has been read before any of the target is written.
        for place, part in zip(self._places(target, half), parts, strict=True):
            place.copy_(part)

    def decode(self, source: torch.Tensor, target: torch.Tensor, half: int) -> None:
        """Decode half of a block into another block."""
        places = self._places(source, half)
        for segment in self._segments:
            layers = self._layers(target, segment)
            if segment.row:
                values = _decoded(next(places), next(places), next(places), segment.row)
                layers.copy_(values.view(torch.uint8).view(segment.layers, segment.nbytes))
            else:
                layers.copy_(next(places).view(segment.layers, segment.nbytes))

    def _layers(self, block: torch.Tensor, segment: Segment) -> torch.Tensor:
        """A segment's bytes of a block, a row for each layer."""
        return block.as_strided(
            (segment.layers, segment.nbytes),
            (segment.stride, 1),
            block.storage_offset() + segment.offset,
        )

    def _places(self, block: torch.Tensor, half: int) -> Iterator[torch.Tensor]:
        """Where the encoded parts are in half a block, one after the other."""
        begin = half * self.half_bytes
        for segment in self._segments:
            for size in segment.sizes:
                yield block[begin : begin + size]
                begin += -(-size // 4) * 4


def _encoded(values: torch.Tensor, row: int) -> list[torch.Tensor]:
    """Scales, high bits and low bits of fp32 values, as bytes."""
    rows = values.view(-1, row)
    scales = rows.abs().amax(1, keepdim=True) / STEPS
    # A row of zeros has no scale; its values are zero steps of any.
    steps = (rows / torch.where(scales > 0, scales, 1)).round_().to(torch.int32)
    steps = steps.clamp_(-STEPS, STEPS).flatten()
    low = (steps & 15).to(torch.uint8)
    if len(low) % 2:
        low = torch.nn.functional.pad(low, (0, 1))
    pairs = low.view(-1, 2)
    return [
        scales.view(torch.uint8).flatten(),
        (steps >> 4).to(torch.int8).view(torch.uint8),
        pairs[:, 0] | pairs[:, 1] << 4,
    ]


def _decoded(scales: torch.Tensor, high: torch.Tensor, low: torch.Tensor, row: int) -> torch.Tensor:
    """Values of which there are the parts."""
    pairs = torch.stack((low & 15, low >> 4), 1).flatten()[: len(high)]
    steps = (high.view(torch.int8).to(torch.int32) << 4) + pairs
    return (steps.view(-1, row) * scales.clone().view(_SCALE).view(-1, 1)).flatten()
