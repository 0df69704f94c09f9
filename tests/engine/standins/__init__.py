"""Plain torch in place of what vLLM's CPU build lacks or does wrongly, for the tests alone.

============= ==============================================================================
rotary        the kernel rotates the wrong places of a tensor with a dimension for the heads
delta         gated delta nets exist in bf16 only, and KDA in Triton only
lightning     lightning attention exists in Triton only
latent        MLA has no chunked prefill or prefix cache, and one head size, read unstrided
cuda          Kimi-Linear's module makes a CUDA stream, and asks for a kernel of several ranks
vision        Qwen3.5's module imports torchvision, which has no build beside a CPU's torch
============= ==============================================================================

They stand in for kernels: layers, loading, metadata of states, block tables, slot mappings and the
caches themselves are vLLM's. In fp32, so that tokens can be compared across schedules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from standins import cuda, delta, latent, lightning, rotary, vision

#: What each family needs.
NEEDED = {
    "lfm2": (rotary.installed,),
    "qwen3_next": (delta.installed,),
    "qwen3_5": (delta.installed, vision.installed),
    "kimi_linear": (cuda.installed, delta.installed, latent.installed),
    "bailing_2_5": (rotary.installed, lightning.installed, latent.installed),
}


@contextlib.contextmanager
def installed(family: str) -> Iterator[None]:
    """Have engines that start here run a family with its stand-ins."""
    with contextlib.ExitStack() as stack:
        for each in NEEDED.get(family, ()):
            stack.enter_context(each())
        yield
