"""What each call of a driver costs, by the length of the run and the size of the chunk."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from avmp_vllm.backing.cuda_memory import CudaMemory
from avmp_vllm.backing.elastic_buffer import PASSED, ElasticBuffer
from avmp_vllm.backing.memory import BackingError, VirtualMemory
from avmp_vllm.backing.posix import AnonymousMemory, MemfdMemory
from avmp_vllm.core.extents import Extents

DRIVERS: dict[str, Callable[[], VirtualMemory]] = {
    "anonymous": AnonymousMemory,
    "memfd": MemfdMemory,
    "cuda": CudaMemory,
}
#: Most bytes of a run.
MOST = 256 << 20
KINDS = ("create", "map", "allow", "touch", "unmap", "release")


def drivers() -> Iterator[tuple[str, Callable[[], VirtualMemory] | None]]:
    """Every driver; None for one that this machine lacks."""
    for name, make in DRIVERS.items():
        try:
            make().close()
        except BackingError:
            yield name, None
        else:
            yield name, make


def _touch(memory: VirtualMemory, address: int, size: int) -> None:
    """Write every byte: what a step pays after mapping, faults included."""
    if isinstance(memory, CudaMemory):
        memory.fill(address, size)
        memory.synchronize()
    else:
        ctypes.memset(address, 1, size)


def run_costs(
    make: Callable[[], VirtualMemory], chunk: int, run: int, rounds: int
) -> dict[str, float]:
    """Seconds of each kind of call, all calls of one run together; medians over rounds."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with make() as memory:
        address = memory.reserve(chunk * run)

        def timed(kind: str, call: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            result = call()
            found[kind].append(time.perf_counter() - begin)
            return result

        def map_all(handles: list[int]) -> None:
            for index, handle in enumerate(handles):
                memory.map(address + index * chunk, handle)

        for _ in range(rounds):
            handles = timed("create", lambda: [memory.create(chunk) for _ in range(run)])
            timed("map", lambda handles=handles: map_all(handles))
            timed("allow", lambda: memory.allow(address, chunk * run))
            timed("touch", lambda: _touch(memory, address, chunk * run))
            timed("unmap", lambda: memory.unmap(address, chunk * run))
            timed("release", lambda handles=handles: [memory.release(h) for h in handles])
    return {kind: median(times) for kind, times in found.items()}


def give_and_take(
    make: Callable[[], VirtualMemory], size: int, chunk: int, rounds: int
) -> dict[str, float]:
    """Seconds in which a buffer that is mapped gives ``size`` bytes back, and takes them again."""
    found: dict[str, list[float]] = {"give back": [], "take": []}
    with make() as memory:
        buffer = ElasticBuffer(memory, size, chunk)
        for number in range(rounds + 1):
            begin = time.perf_counter()
            if buffer.set_budget(size) < buffer.size:
                raise BackingError(f"the system has no {size} bytes")
            buffer.map(Extents(buffer.size, buffer.size))
            if number:  # the first time also warms the system up
                found["take"].append(time.perf_counter() - begin)
            buffer.retire(Extents(0, buffer.size), PASSED)
            begin = time.perf_counter()
            buffer.set_budget(0)
            found["give back"].append(time.perf_counter() - begin)
        buffer.close()
    return {kind: median(times) for kind, times in found.items()}
