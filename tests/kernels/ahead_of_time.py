"""Compile kernels for GPUs that are not there, through the very launchers that would launch them.

A stand-in driver names the target, and every launch becomes a compilation that is recorded. So what
is compiled is what a launcher asks for: its tile sizes, warps, stages and specialised arguments.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from avmp_kernels import fp8
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Shared memory one block may use (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024}
_NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Binary(NamedTuple):
    """One compiled kernel. ``stack`` is what it keeps in local memory: spilled registers."""

    kernel: str
    capability: int
    warps: int
    registers: int
    stack: int
    shared: int
    cubin: bytes
    ptx: str

    def __str__(self) -> str:
        return (
            f"sm_{self.capability} {self.kernel:<28} {self.warps} warps {self.registers:>3} regs "
            f"{self.stack:>4} B stack {self.shared / 1024:>5.1f} KiB shared"
        )

    def sass(self) -> str:
        """Return the machine code as text."""
        return _inspect(self.cubin, "nvdisasm", "-c")


class _Driver:
    """Names the target; there is no device behind it."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # launchers keep one cache a device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(capability: int, monkeypatch) -> Iterator[list[Binary]]:
    """Turn launches into compilations for ``capability`` (80, 86, 90); yield their list."""
    assert not knobs.runtime.interpret, "TRITON_INTERPRET is set: nothing would be compiled"
    binaries: list[Binary] = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        assert all(isinstance(n, int) and n >= 1 for n in grid), grid
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        binaries.append(_measured(kernel, capability))
        return kernel

    before = driver._active
    with tempfile.TemporaryDirectory() as cache, monkeypatch.context() as patch:
        patch.setattr(knobs.cache, "dir", cache)
        patch.setattr(JITFunction, "run", compile_instead)
        patch.setattr(fp8, "has_fp8", lambda device: capability >= 89)
        driver.set_active(_Driver(capability))
        try:
            yield binaries
        finally:
            driver._active = before


def _measured(kernel, capability: int) -> Binary:
    cubin = kernel.asm["cubin"]
    usage = _inspect(cubin, "cuobjdump", "--dump-resource-usage")
    figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}
    return Binary(
        kernel.metadata.name,
        capability,
        kernel.metadata.num_warps,
        figures["REG"],
        figures["STACK"] + figures["LOCAL"],
        kernel.metadata.shared,
        cubin,
        kernel.asm["ptx"],
    )


def _inspect(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_NVIDIA / tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return a tensor without memory: only its shape, strides and alignment count here."""
    return torch.empty(*shape, dtype=dtype, device="meta")
