"""What every driver of virtual memory must do, a case a function; a program that runs one.

``python conformance.py DRIVER CASE`` ends with status 0 if the case holds. Cases in ``FAULTS`` must
end by a fault instead. They run in processes of their own: a fault is the end of one, and the CUDA
driver is chosen by ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from avmp_vllm.backing.cuda_memory import CudaMemory
from avmp_vllm.backing.elastic_buffer import PASSED, BudgetExceeded, ElasticBuffer
from avmp_vllm.backing.memory import (
    AlreadyMapped,
    BackingError,
    DriverError,
    HalfMapping,
    Misaligned,
    NoAliases,
    NotMapped,
    NotReserved,
    OutOfMemory,
    StillMapped,
    UnknownHandle,
    VirtualMemory,
)
from avmp_vllm.backing.posix import AnonymousMemory, MemfdMemory
from avmp_vllm.core.extents import Extents

MIB = 1 << 20
#: A handle of the cases, bytes: a multiple of every driver's granularity.
CHUNK = 2 * MIB
#: The status of a process in which CUDA refused an access, which on the host is a fault.
CUDA_FAULT = 77


class Host:
    """Bytes at addresses of the host."""

    def __init__(self, memory: VirtualMemory) -> None:
        self.memory = memory

    def poke(self, address: int, data: bytes) -> None:
        """Write bytes."""
        ctypes.memmove(address, data, len(data))

    def peek(self, address: int, size: int) -> bytes:
        """Read bytes."""
        return ctypes.string_at(address, size)


class Device(Host):
    """Bytes at addresses of a device, copied by its driver."""

    memory: CudaMemory

    def poke(self, address: int, data: bytes) -> None:
        try:
            self.memory._call("cuMemcpyHtoD", address, data, len(data))
            # A copy from pageable memory may still run on return, and would fault if its target
            # were unmapped.
            self.memory.synchronize()
        except DriverError:
            sys.exit(CUDA_FAULT)

    def peek(self, address: int, size: int) -> bytes:
        data = bytearray(size)
        try:
            self.memory._call("cuMemcpyDtoH", data, address, size)
        except DriverError:
            sys.exit(CUDA_FAULT)
        return bytes(data)


DRIVERS: dict[str, tuple[Callable[[], VirtualMemory], type[Host]]] = {
    "anonymous": (AnonymousMemory, Host),
    "memfd": (MemfdMemory, Host),
    "fake-cuda": (CudaMemory, Device),
    "cuda": (CudaMemory, Device),
}

CASES: dict[str, Callable[[Host], None]] = {}
FAULTS: set[str] = set()


def case(function: Callable[[Host], None]) -> Callable[[Host], None]:
    """Enter a case."""
    CASES[function.__name__] = function
    return function


def fault(function: Callable[[Host], None]) -> Callable[[Host], None]:
    """Enter a case whose last line must fault."""
    FAULTS.add(function.__name__)
    return case(function)


def refused(error: type[BackingError], call: Callable[[], object], match: str = "") -> None:
    """A call must be refused, and with this error."""
    found: BackingError | None = None
    try:
        call()
    except BackingError as caught:
        found = caught
    assert type(found) is error, f"{type(found).__name__} ({found}), not {error.__name__}"
    assert re.search(match, str(found)), str(found)


def ready(host: Host, chunks: int, size: int = CHUNK) -> tuple[int, list[int]]:
    """Reserve addresses of eight chunks; map and allow some at the low end."""
    memory = host.memory
    address = memory.reserve(8 * size)
    handles = [memory.create(size) for _ in range(chunks)]
    for index, handle in enumerate(handles):
        memory.map(address + index * size, handle)
    if chunks:
        memory.allow(address, chunks * size)
    return address, handles


def marks(address: int, chunks: int) -> list[tuple[int, bytes]]:
    """Bytes at both ends of each chunk, all different."""
    places = [address + i * CHUNK + end for i in range(chunks) for end in (0, CHUNK - 8)]
    return [(place, (n + 1).to_bytes(8, "little")) for n, place in enumerate(places)]


# -- what works ------------------------------------------------------------------------------------


@case
def bytes_stay_where_they_are_written(host: Host) -> None:
    address, _ = ready(host, 3)
    for place, data in marks(address, 3):
        host.poke(place, data)
    for place, data in marks(address, 3):
        assert host.peek(place, 8) == data


@case
def bytes_go_with_their_handle(host: Host) -> None:
    address, handles = ready(host, 2)
    memory = host.memory
    for place, data in marks(address, 2):
        host.poke(place, data)
    memory.unmap(address, 2 * CHUNK)
    for index, handle in enumerate(reversed(handles)):
        memory.map(address + (5 + index) * CHUNK, handle)
    memory.allow(address + 5 * CHUNK, 2 * CHUNK)
    found = [host.peek(address + 5 * CHUNK + at, 8) for at in (CHUNK, 2 * CHUNK - 8, 0, CHUNK - 8)]
    assert found == [data for _, data in marks(address, 2)]


@case
def the_middle_of_a_run_can_go_and_come_back(host: Host) -> None:
    address, handles = ready(host, 5)
    memory = host.memory
    for place, data in marks(address, 5):
        host.poke(place, data)
    memory.unmap(address + CHUNK, 2 * CHUNK)
    assert host.peek(address, 8) == marks(address, 5)[0][1]
    assert host.peek(address + 3 * CHUNK, 8) == marks(address, 5)[6][1]
    memory.map(address + CHUNK, handles[1])
    memory.map(address + 2 * CHUNK, handles[2])
    memory.allow(address + CHUNK, 2 * CHUNK)
    for place, data in marks(address, 5):
        assert host.peek(place, 8) == data


@case
def handles_of_several_granules(host: Host) -> None:
    memory = host.memory
    address, _ = ready(host, 2, size=3 * CHUNK)
    host.poke(address + 5 * CHUNK, b"far")
    assert host.peek(address + 5 * CHUNK, 3) == b"far"
    refused(HalfMapping, lambda: memory.unmap(address, CHUNK))
    memory.unmap(address + 3 * CHUNK, 3 * CHUNK)


@case
def a_released_handle_lives_while_it_is_mapped(host: Host) -> None:
    address, (handle,) = ready(host, 1)
    memory = host.memory
    host.poke(address, b"kept")
    memory.release(handle)
    assert host.peek(address, 4) == b"kept"
    refused(UnknownHandle, lambda: memory.map(address + CHUNK, handle))
    refused(UnknownHandle, lambda: memory.release(handle))
    memory.unmap(address, CHUNK)


@case
def a_handle_is_used_again_and_again(host: Host) -> None:
    address, (handle,) = ready(host, 1)
    memory = host.memory
    for turn in range(200):
        host.poke(address + turn % 8 * CHUNK, bytes([turn]))
        memory.unmap(address + turn % 8 * CHUNK, CHUNK)
        memory.map(address + (turn + 1) % 8 * CHUNK, handle)
        memory.allow(address + (turn + 1) % 8 * CHUNK, CHUNK)
        assert host.peek(address + (turn + 1) % 8 * CHUNK, 1) == bytes([turn])


@case
def aliases(host: Host) -> None:
    """Two addresses of one handle show the same bytes; where there are none, it is said."""
    address, (handle,) = ready(host, 1)
    memory = host.memory
    if not memory.aliases:
        refused(NoAliases, lambda: memory.map(address + 3 * CHUNK, handle), "once only")
        return
    memory.map(address + 3 * CHUNK, handle)
    memory.allow(address + 3 * CHUNK, CHUNK)
    host.poke(address + 3 * CHUNK + 5, b"both")
    assert host.peek(address + 5, 4) == b"both"
    memory.release(handle)
    memory.unmap(address, CHUNK)
    assert host.peek(address + 3 * CHUNK + 5, 4) == b"both"
    memory.unmap(address + 3 * CHUNK, CHUNK)


# -- what faults -----------------------------------------------------------------------------------


@fault
def reserved_addresses_fault(host: Host) -> None:
    address, _ = ready(host, 1)
    host.peek(address + CHUNK, 1)


@fault
def a_write_to_reserved_addresses_faults(host: Host) -> None:
    address, _ = ready(host, 1)
    host.poke(address + CHUNK, b"x")


@fault
def mapped_addresses_fault_before_access_is_allowed(host: Host) -> None:
    address, _ = ready(host, 1)
    host.memory.map(address + CHUNK, host.memory.create(CHUNK))
    host.peek(address + CHUNK, 1)


@fault
def unmapped_addresses_fault(host: Host) -> None:
    address, _ = ready(host, 3)
    host.poke(address + CHUNK, b"x")
    host.memory.unmap(address + CHUNK, CHUNK)
    host.peek(address + CHUNK, 1)


@fault
def access_does_not_outlive_a_mapping(host: Host) -> None:
    """Another handle at the same addresses has to be allowed anew."""
    address, _ = ready(host, 1)
    other = host.memory.create(CHUNK)
    host.memory.unmap(address, CHUNK)
    host.memory.map(address, other)
    host.peek(address, 1)


@fault
def closed_memory_faults(host: Host) -> None:
    address, _ = ready(host, 1)
    host.poke(address, b"x")
    host.memory.close()
    host.peek(address, 1)


# -- what is refused -------------------------------------------------------------------------------


@case
def half_unmaps_are_refused(host: Host) -> None:
    memory, size = host.memory, 2 * CHUNK
    address, _ = ready(host, 2, size=size)
    host.poke(address + CHUNK, b"whole")
    for start, length in ((0, CHUNK), (CHUNK, CHUNK), (CHUNK, size), (0, size + CHUNK)):
        refused(HalfMapping, lambda at=start, n=length: memory.unmap(address + at, n))
        refused(HalfMapping, lambda at=start, n=length: memory.allow(address + at, n))
    assert host.peek(address + CHUNK, 5) == b"whole"
    memory.unmap(address, 2 * size)


@case
def holes_are_refused(host: Host) -> None:
    memory = host.memory
    address, _ = ready(host, 3)
    memory.unmap(address + CHUNK, CHUNK)
    for start, chunks in ((0, 2), (0, 3), (1, 1), (1, 2), (3, 1), (2, 2)):
        refused(NotMapped, lambda at=start, n=chunks: memory.unmap(address + at * CHUNK, n * CHUNK))
        refused(NotMapped, lambda at=start, n=chunks: memory.allow(address + at * CHUNK, n * CHUNK))
    refused(NotMapped, lambda: memory.unmap(address, 0))


@case
def a_second_mapping_at_an_address_is_refused(host: Host) -> None:
    memory = host.memory
    address, _ = ready(host, 2)
    host.poke(address, b"first")
    other, large = memory.create(CHUNK), memory.create(2 * CHUNK)
    refused(AlreadyMapped, lambda: memory.map(address, other))
    refused(AlreadyMapped, lambda: memory.map(address + CHUNK, large))
    assert host.peek(address, 5) == b"first"
    memory.map(address + 2 * CHUNK, large)


@case
def addresses_that_are_not_reserved_are_refused(host: Host) -> None:
    memory = host.memory
    address, _ = ready(host, 0)
    handle = memory.create(2 * CHUNK)
    refused(NotReserved, lambda: memory.map(address + 8 * CHUNK, handle))
    refused(NotReserved, lambda: memory.map(address + 7 * CHUNK, handle))
    refused(NotReserved, lambda: memory.map(address - CHUNK, handle))
    refused(NotReserved, lambda: memory.free(address + CHUNK))
    memory.map(address + 6 * CHUNK, handle)


@case
def a_reservation_in_use_is_not_freed(host: Host) -> None:
    memory = host.memory
    address, _ = ready(host, 2)
    memory.unmap(address, CHUNK)
    refused(StillMapped, lambda: memory.free(address))
    memory.unmap(address + CHUNK, CHUNK)
    memory.free(address)
    refused(NotReserved, lambda: memory.free(address))


@case
def broken_sizes_are_refused(host: Host) -> None:
    memory = host.memory
    unit = memory.granularity
    assert CHUNK % unit == 0
    address, _ = ready(host, 0)
    handle = memory.create(CHUNK)
    for size in (0, -unit, unit - 1, unit + 1):
        refused(Misaligned, lambda n=size: memory.create(n))
        refused(Misaligned, lambda n=size: memory.reserve(n))
    refused(Misaligned, lambda: memory.map(address + unit // 2, handle), "granularity")


@case
def the_driver_itself_refuses_halves(host: Host) -> None:
    """Past our own checks; on the host nobody else checks."""
    memory = host.memory
    if not isinstance(memory, CudaMemory):
        return
    address, _ = ready(host, 2, size=2 * CHUNK)
    refused(DriverError, lambda: memory._unmap(address, CHUNK, []), "CUDA_ERROR_INVALID_VALUE")
    refused(DriverError, lambda: memory._free(address, 16 * CHUNK), "CUDA_ERROR_INVALID_VALUE")


# -- an elastic buffer over it ---------------------------------------------------------------------


def two_ends(host: Host) -> ElasticBuffer:
    """A buffer of ten chunks with a budget of six, of which five are needed and written."""
    buffer = ElasticBuffer(host.memory, 10 * CHUNK, CHUNK)
    assert buffer.set_budget(6 * CHUNK) == 6 * CHUNK
    buffer.map(Extents(2 * CHUNK, 7 * CHUNK))
    for place, data in marks(buffer.address, 2) + marks(buffer.address + 7 * CHUNK, 3):
        host.poke(place, data)
    return buffer


@case
def a_buffer_moves_its_memory_between_the_ends(host: Host) -> None:
    buffer = two_ends(host)
    refused(BudgetExceeded, lambda: buffer.map(Extents(4 * CHUNK, 7 * CHUNK)))
    buffer.retire(Extents(CHUNK, 9 * CHUNK), PASSED)
    buffer.map(Extents(5 * CHUNK, 9 * CHUNK))
    assert buffer.mapped == 6 * CHUNK
    assert host.peek(buffer.address, 8) == marks(0, 1)[0][1]
    assert host.peek(buffer.address + 10 * CHUNK - 8, 8) == marks(0, 3)[-1][1]
    host.poke(buffer.address + 5 * CHUNK - 1, b"x")
    buffer.retire(Extents(CHUNK, 9 * CHUNK), PASSED)
    assert buffer.set_budget(2 * CHUNK) == 2 * CHUNK
    assert buffer.statistics.given_back == 4 * CHUNK
    assert buffer.set_budget(9 * CHUNK) == 9 * CHUNK
    buffer.map(Extents(4 * CHUNK, 5 * CHUNK))
    host.poke(buffer.address + 5 * CHUNK, b"x")
    buffer.close()


@case
def retired_chunks_keep_their_memory_until_it_is_wanted(host: Host) -> None:
    buffer = two_ends(host)
    buffer.retire(Extents(CHUNK, 9 * CHUNK), PASSED)
    calls = dict(buffer.statistics.calls)
    buffer.map(Extents(2 * CHUNK, 7 * CHUNK))
    assert buffer.statistics.calls == calls
    assert host.peek(buffer.address + 2 * CHUNK - 8, 8) == marks(0, 2)[-1][1]


@fault
def the_gap_of_a_buffer_faults(host: Host) -> None:
    buffer = two_ends(host)
    host.peek(buffer.address + 7 * CHUNK - 1, 1)


@fault
def what_a_buffer_gave_back_faults(host: Host) -> None:
    buffer = two_ends(host)
    buffer.retire(Extents(CHUNK, 9 * CHUNK), PASSED)
    host.peek(buffer.address + CHUNK, 1)
    buffer.set_budget(2 * CHUNK)
    host.peek(buffer.address + CHUNK, 1)


# -- out of memory ---------------------------------------------------------------------------------


def shrink_the_system(host: Host) -> int:
    """Leave memory for a few chunks more; how many of 64 MiB a case may ask for at most."""
    if isinstance(host.memory, AnonymousMemory):
        _, used = footprint()
        resource.setrlimit(resource.RLIMIT_AS, (used + 300 * MIB, resource.RLIM_INFINITY))
    elif isinstance(host.memory, MemfdMemory):
        host.memory._limit = 300 * MIB  # memory files know no limit of a process
    else:
        return 1 << 12  # the device's own
    return 8


@case
def out_of_memory_is_typed_and_changes_nothing(host: Host) -> None:
    memory, size = host.memory, 64 * MIB
    address = memory.reserve(size)
    most = shrink_the_system(host)
    handles: list[int] = []
    while len(handles) < most:
        try:
            handles.append(memory.create(size))
        except OutOfMemory:
            break
    assert 2 <= len(handles) < most, len(handles)
    refused(OutOfMemory, lambda: memory.create(size))
    memory.release(handles.pop())
    handles.append(memory.create(size))
    memory.map(address, handles[0])
    memory.allow(address, size)
    host.poke(address + size - 4, b"last")
    assert host.peek(address + size - 4, 4) == b"last"


@case
def no_room_for_addresses_is_typed(host: Host) -> None:
    refused(OutOfMemory, lambda: host.memory.reserve(1 << 50))


@case
def a_handle_has_its_memory_before_it_is_mapped(host: Host) -> None:
    """Nothing that comes after create can run out of memory: it is taken there and then."""
    if isinstance(host.memory, CudaMemory):
        return  # the driver promises it, and no counter of this process shows it
    before = resident()
    handles = [host.memory.create(CHUNK) for _ in range(16)]
    assert resident_or_shared(host, before) >= 16 * CHUNK - MIB
    for handle in handles:
        host.memory.release(handle)
    assert resident_or_shared(host, before) < 4 * MIB


# -- the end ---------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10


def resident_or_shared(host: Host, before: int) -> int:
    """Bytes that came since, a memory file's own counted where no process maps them."""
    if isinstance(host.memory, MemfdMemory):
        return os.fstat(host.memory._file).st_blocks * 512
    return resident() - before


def footprint() -> tuple[int, int]:
    """Open files, and bytes of addresses, of this process."""
    size = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    return len(os.listdir("/proc/self/fd")), size


@case
def nothing_is_left_after_close(host: Host) -> None:
    make, _ = DRIVERS[sys.argv[1]]
    host.memory.close()
    files, size = footprint()
    before = resident()
    for _ in range(3):
        again = type(host)(make())
        address, handles = ready(again, 6)
        ready(again, 1, size=3 * CHUNK)
        for place, data in marks(address, 6):
            again.poke(place, data)
        again.memory.unmap(address + CHUNK, 2 * CHUNK)
        again.memory.release(handles[4])
        again.memory.create(CHUNK)
        again.memory.close()
        again.memory.close()
    if sys.argv[1] == "cuda":  # a context made anew keeps files, addresses and memory of the host
        return
    # A fake driver keeps its one file, as a real one keeps its device open.
    assert footprint()[0] <= files + (sys.argv[1] == "fake-cuda")
    assert footprint()[1] - size < CHUNK
    assert resident() - before < CHUNK
    if sys.argv[1] == "fake-cuda":
        fake = ctypes.CDLL("libcuda.so.1")
        left = [fake.fake_handles(), fake.fake_mappings(), fake.fake_reservations()]
        assert left == [0, 0, 0], left


@case
def the_end_of_a_with_block_closes(host: Host) -> None:
    with host.memory as memory:
        address, _ = ready(host, 2)
    refused(NotReserved, lambda: memory.free(address))


def hold(host: Host) -> None:
    """Take 512 MiB, say so and wait to be killed (no case: see the test of kill -9)."""
    address, _ = ready(host, 8, size=64 * MIB)
    for index in range(8):
        host.poke(address + index * 64 * MIB, bytes(64 * MIB))
    print("held", flush=True)
    time.sleep(60)


def main(driver: str, name: str) -> None:
    """Run one case."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    make, host = DRIVERS[driver]
    (hold if name == "hold" else CASES[name])(host(make()))


if __name__ == "__main__":
    main(*sys.argv[1:])
