"""Which card and which driver a result was measured on."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch
import triton


def describe(device: torch.device) -> dict[str, Any]:
    """Name, capability, CUDA of torch, driver, Triton; nothing that tells one machine from another.

    ``driver`` is its version as ``nvidia-smi`` says it, or None where there is no such program.
    """
    return {
        "card": torch.cuda.get_device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)),
        "cuda": torch.version.cuda,
        "driver": _driver_version(),
        "triton": triton.__version__,
    }


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return said[0] if said else None
