"""Which card and which driver a result was measured on."""

from __future__ import annotations

from typing import Any

import torch
import triton


def describe(device: torch.device) -> dict[str, Any]:
    """Name, capability, CUDA of torch, driver, Triton; nothing that tells one machine from another.

    ``driver`` is the CUDA version that the driver supports, as it counts (13010 is 13.1), or None.
    """
    count = getattr(torch._C, "_cuda_getDriverVersion", None)
    return {
        "card": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "driver": count() if count else None,
        "triton": triton.__version__,
    }
