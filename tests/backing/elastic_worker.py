"""A worker over real memory of which only two ends are mapped; a program, since a fault ends it.

``python elastic_worker.py DRIVER [without]``: requests come and go on a real arena, the budget
falls and rises, every page's bytes are checked after every plan. Prints resident bytes at the
budgets.
With ``without`` nothing is mapped for the plans, and the process must die.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

from elastic_client import ElasticClient, ElasticShadow
from test_elastic import churn

from avmp_vllm.backing.elastic_buffer import ElasticBuffer
from avmp_vllm.backing.elastic_pages import ElasticPages
from avmp_vllm.backing.memory import VirtualMemory
from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.backing.posix import AnonymousMemory, MemfdMemory
from avmp_vllm.backing.tensor import tensor_over
from avmp_vllm.backing.torch_buffer import TorchBuffer
from avmp_vllm.core import Extents, Geometry, Kind, MovePlan, Relocation, Stage

DRIVERS: dict[str, type[VirtualMemory]] = {"anonymous": AnonymousMemory, "memfd": MemfdMemory}
MIB = 1 << 20
#: An arena of 96 chunks of 2 MiB, with pages and blocks both smaller and larger than that.
GEOMETRY, CHUNK = Geometry(192 * MIB - 4096, 256 << 10, 5 * MIB), 2 * MIB


class RealMemory(ElasticShadow):
    """The checks of the shadow, over the code and the memory that workers use."""

    def __init__(self, memory: VirtualMemory) -> None:
        super().__init__(GEOMETRY, CHUNK)
        self.buffer = ElasticBuffer(memory, GEOMETRY.arena_bytes, CHUNK, GEOMETRY.high_end)
        self.buffer.set_budget(self.buffer.size)
        # Torch needs no memory behind the range to view it.
        raw = tensor_over(memory, self.buffer.address, self.buffer.size)
        self.bytes = memoryview(raw.numpy())  # type: ignore[assignment]
        self.pages = ElasticPages(self.buffer, TorchBuffer(raw, GEOMETRY))
        self.table = PageTable(GEOMETRY)

    def physical(self, handle: int) -> int:
        return self.table.physical(handle)

    def forget(self, chunk: int) -> None:
        """The bytes of a retired chunk are there or fault."""

    def zero(self, kind: Kind, index: int) -> None:
        self.pages.apply(MovePlan(0, zeros=[index]))


class RealClient(ElasticClient):
    """Sends real plans to the worker; the client's own bookkeeping of chunks stays."""

    def __init__(self, memory: VirtualMemory, mapped: bool) -> None:
        super().__init__(GEOMETRY, 1, CHUNK)
        self.mapped = mapped
        self.real = RealMemory(memory)
        self.memory = self.real
        if mapped:
            self.real.pages.apply(MovePlan(0, stages=(Stage(0, self.arena.extents),)))
        self.real.back(self.arena.extents)
        self.worker = self.real

    def set_budget(self, chunks: int) -> None:
        super().set_budget(chunks)
        if chunks * CHUNK > self.real.buffer.budget:
            self.real.buffer.set_budget(chunks * CHUNK)

    def _follow(self, moves: Iterable[Relocation]) -> None:
        moves, log = list(moves), self.arena._log
        assert log is not None
        told, stages = log._told, tuple(log._stages)
        taken = log.take(self.arena.extents)
        plan = MovePlan(0, relocations=moves)
        if taken is not None and self.mapped:
            plan = replace(plan, stages=taken[0], after=taken[1])
        self.real.pages.apply(plan)
        self.real.table.apply(moves)
        # The same once more for the client's own checks, which move no bytes.
        log._told, log._stages = told, list(stages)
        self.real.relocate = lambda moves: None  # type: ignore[method-assign]
        super()._follow(moves)
        if self.mapped:
            # Lowered only now: the plan may have needed what the old budget had.
            self.real.buffer.set_budget(self.budget * CHUNK)
            mapped, allowed = self.real.buffer.mapped, max(self.budget, len(self.real.backed))
            assert mapped <= allowed * CHUNK


def resident() -> int:
    """Bytes of this process in memory, anonymous and shared."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def main(driver: str, mapped: bool) -> None:
    """Churn, then fill and empty under two budgets, and print what is resident."""
    memory = DRIVERS[driver]()
    before = resident()
    client = RealClient(memory, mapped)
    churn(client, random.Random("real"), 220)
    buffer = client.real.buffer
    for handle in list(client.model.cached):
        client.drop(handle)
    client.release(list(client.model.live), keep=False)
    client.set_budget(client.whole)
    assert client.allocate(client.arena.available(Kind.KV), 0)
    client.step()
    full = resident() - before
    client.release(list(client.model.live), keep=False)
    client.trim()
    client.set_budget(8)
    client.step()
    idle = resident() - before
    calls = buffer.statistics
    print(f"full {full} idle {idle} mapped {buffer.mapped} {calls}")
    assert buffer.mapped <= 8 * CHUNK
    assert full > 150 * MIB
    assert idle < 8 * CHUNK + 30 * MIB
    assert calls.given_back > 100 * MIB
    null = GEOMETRY.null_blocks * GEOMETRY.block_bytes
    assert client.arena.extents == Extents(null, GEOMETRY.high_end)
    assert buffer.needed <= null + 2 * CHUNK
    buffer.close()
    memory.close()


if __name__ == "__main__":
    main(sys.argv[1], "without" not in sys.argv)
