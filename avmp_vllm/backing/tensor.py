"""A torch tensor over addresses that some driver reserved."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from avmp_vllm.backing.cuda_memory import CudaMemory
from avmp_vllm.backing.memory import BackingError, VirtualMemory


class _Range:
    """A range of a CUDA device, as its array interface describes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def tensor_over(memory: VirtualMemory, address: int, size: int) -> torch.Tensor:
    """View a range as bytes, without touching them.

    Elements without memory fault when they are touched, and so does every element after the range
    is freed: the tensor does not keep it.

    Args:
        memory: The driver that reserved the range.
        address: Where it begins. On CUDA there must be memory, by which torch finds the device.
        size: Bytes.

    Returns:
        uint8 ``[size]``.
    """
    if isinstance(memory, CudaMemory):
        device = torch.device("cuda", memory.ordinal)
        view = torch.as_tensor(_Range(address, size), device=device)
        if view.data_ptr() != address:
            raise BackingError(f"torch copied the range at {address:#x} instead of viewing it")
        return view
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)
