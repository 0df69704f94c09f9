"""The system calls behind POSIX memory. Python's mmap module cannot map at an address."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from avmp_vllm.backing.memory import DriverError, OutOfMemory

PROT_NONE, PROT_ALL = 0, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# From Linux's headers, where Python does not have them.
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_FAILED = (-1, ctypes.c_void_p(-1).value)
_pointer, _size, _int, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
for _name, _result, _arguments in (
    ("mmap", _pointer, [_pointer, _size, _int, _int, _int, _offset]),
    ("munmap", _int, [_pointer, _size]),
    ("mprotect", _int, [_pointer, _size, _int]),
    ("madvise", _int, [_pointer, _size, _int]),
    ("mremap", _pointer, [_pointer, _size, _size, _int, _pointer]),
    ("fallocate", _int, [_int, _int, _offset, _offset]),
):
    _function = getattr(_libc, _name)
    _function.restype, _function.argtypes = _result, _arguments


def _check(name: str, result: int | None) -> int:
    """Turn an error into an exception, and a null pointer into 0.

    Raises:
        OutOfMemory: The kernel has no memory, no room for addresses, or no more mappings.
        DriverError: Everything else.
    """
    if result not in _FAILED:
        return result or 0
    code = ctypes.get_errno()
    text = f"{name}: {os.strerror(code)}"
    if code in (errno.ENOMEM, errno.ENOSPC, errno.EAGAIN):
        raise OutOfMemory(text)
    raise DriverError(text, code)


def map_pages(
    address: int | None, size: int, protection: int, flags: int, file: int = -1, offset: int = 0
) -> int:
    """mmap."""
    return _check("mmap", _libc.mmap(address, size, protection, flags, file, offset))


def unmap_pages(address: int, size: int) -> None:
    """munmap."""
    _check("munmap", _libc.munmap(address, size))


def protect(address: int, size: int, protection: int) -> None:
    """mprotect."""
    _check("mprotect", _libc.mprotect(address, size, protection))


def advise(address: int, size: int, advice: int) -> None:
    """madvise."""
    _check("madvise", _libc.madvise(address, size, advice))


def move_pages(source: int, size: int, target: int) -> None:
    """mremap to an address; the source stays mapped, without memory."""
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP
    _check("mremap", _libc.mremap(source, size, size, flags, target))


def allocate_file(file: int, mode: int, offset: int, size: int) -> None:
    """fallocate."""
    _check("fallocate", _libc.fallocate(file, mode, offset, size))


def reserve_addresses(size: int, alignment: int) -> int:
    """Map pages that fault, on a boundary, and nothing beside them."""
    flags = PRIVATE | MAP_NORESERVE
    start = map_pages(None, size + alignment, PROT_NONE, flags)
    address = -(-start // alignment) * alignment
    if address > start:
        unmap_pages(start, address - start)
    if rest := start + alignment - address:
        unmap_pages(address + size, rest)
    return address


def fault_again(address: int, size: int) -> None:
    """Put pages without memory where others were; an access faults."""
    flags = PRIVATE | MAP_NORESERVE | MAP_FIXED
    map_pages(address, size, PROT_NONE, flags)
