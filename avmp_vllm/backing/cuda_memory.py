"""Virtual memory of a CUDA device, by the driver's own calls."""

from __future__ import annotations

from typing import Any

from avmp_vllm.backing.memory import BackingError, DriverError, OutOfMemory, VirtualMemory


class CudaMemory(VirtualMemory):
    """Memory of one device, read and written by that device.

    Args:
        device: Ordinal, as CUDA counts them.

    Raises:
        BackingError: No driver, no such device, or one that cannot map at an address.
    """

    name = "CUDA"
    aliases = True

    def __init__(self, device: int = 0) -> None:
        super().__init__()
        try:
            from cuda.bindings import driver  # type: ignore[import, unused-ignore]
        except ImportError as error:
            raise BackingError(f"the CUDA driver cannot be called: {error}") from error
        self._driver: Any = driver
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # cuda.bindings found no library, or the library no device
            raise BackingError(f"there is no CUDA driver: {error}") from error
        self.ordinal = device
        self._device = self._call("cuDeviceGet", device)
        supported = (
            driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        )
        if not self._call("cuDeviceGetAttribute", supported, self._device):
            raise BackingError(f"CUDA device {device} has no virtual memory management")
        # The context that torch uses as well.
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._call("cuCtxSetCurrent", self._context)
        where = driver.CUmemLocation()
        where.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        where.id = device
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = where
        self._access = driver.CUmemAccessDesc()
        self._access.location = where
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.granularity = self._call(
            "cuMemGetAllocationGranularity",
            self._properties,
            driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM,
        )
        self._raw: dict[int, Any] = {}
        self._next = 1

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call the driver; its second result, if it has one.

        Raises:
            OutOfMemory: The device has no more.
            DriverError: Everything else.
        """
        code, *values = getattr(self._driver, name)(*arguments)
        if code != self._driver.CUresult.CUDA_SUCCESS:
            text = f"{name}: {code.name}"
            if code == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
                raise OutOfMemory(text)
            raise DriverError(text, int(code))
        return values[0] if values else None

    def synchronize(self) -> None:
        """Wait for everything that was launched on the device."""
        self._call("cuCtxSynchronize")

    def fill(self, address: int, size: int, value: int = 0) -> None:
        """Set bytes that are mapped and allowed, in the order of the default stream."""
        self._call("cuMemsetD8", address, value, size)

    def _reserve(self, size: int) -> int:
        return int(self._call("cuMemAddressReserve", size, 0, 0, 0))

    def _free(self, address: int, size: int) -> None:
        self._call("cuMemAddressFree", address, size)

    def _create(self, size: int) -> int:
        raw = self._call("cuMemCreate", size, self._properties, 0)
        handle, self._next = self._next, self._next + 1
        self._raw[handle] = raw
        return handle

    def _release(self, handle: int) -> None:
        self._call("cuMemRelease", self._raw[handle])
        del self._raw[handle]

    def _map(self, address: int, handle: int, size: int) -> None:
        self._call("cuMemMap", address, size, 0, self._raw[handle], 0)

    def _allow(self, address: int, size: int) -> None:
        self._call("cuMemSetAccess", address, size, [self._access], 1)

    def _unmap(self, address: int, size: int, run: list[tuple[int, int]]) -> None:
        self._call("cuMemUnmap", address, size)

    def _close(self) -> None:
        self._call("cuDevicePrimaryCtxRelease", self._device)
