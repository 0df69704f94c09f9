"""fp8 (e4m3) in integer arithmetic, for cards without conversion instructions.

Triton refuses e4m3 below compute capability 8.9, so on those cards (A100, RTX 30) a KV cache in fp8
is read and written as bytes: 1 sign, 4 exponent (bias 7) and 3 mantissa bits, no infinities, NaN at
0x7f. On newer cards the kernels use the hardware's conversion instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

E4M3_MAX = 448.0
_MAX = tl.constexpr(E4M3_MAX)


def has_fp8(device: torch.device) -> bool:
    """Return whether Triton converts e4m3 natively on a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def decode_e4m3(byte):
    """Return the fp16 values of e4m3 bytes (uint8, any shape). Exact; NaN is not preserved.

    Moved up by seven bits, exponent and mantissa are those of an fp16 number that is 2**8 too small
    (the biases are 7 and 15), subnormals included.
    """
    wide = byte.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def encode_e4m3(value):
    """Return the e4m3 bytes (uint8) of fp32 values, rounded to nearest even, saturated at 448."""
    bits = value.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(value), _MAX)
    size_bits = size.to(tl.uint32, bitcast=True)
    # Normal numbers: round the 23 mantissa bits to 3; a carry moves into the exponent by itself.
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Subnormals are multiples of 2**-9; adding 2**14 leaves that multiple in the lowest bits.
    subnormal = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    return (tl.where(size < 0.015625, subnormal, normal) | sign).to(tl.uint8)
