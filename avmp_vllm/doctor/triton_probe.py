"""Run one Triton kernel, on the GPU or interpreted, and say which it was.

A program of its own (``python -m avmp_vllm.doctor.triton_probe``): Triton decides at import whether
it interprets, and a broken driver may end the process.
"""

from __future__ import annotations

import os
import sys

import torch
import triton
import triton.language as tl

_COUNT, _BLOCK = 100, 64


@triton.jit
def _add_one(source, target, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at, mask=at < count) + 1, mask=at < count)


def main() -> int:
    """Print where the kernel ran; a wrong result or an exception ends with another status."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    source = torch.arange(_COUNT, dtype=torch.float32, device="cpu" if interpreted else "cuda")
    target = torch.zeros_like(source)
    _add_one[(triton.cdiv(_COUNT, _BLOCK),)](source, target, _COUNT, BLOCK=_BLOCK)
    if not torch.equal(target, source + 1):
        print("the kernel's result is wrong", file=sys.stderr)
        return 1
    print("interpreted" if interpreted else f"on {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
