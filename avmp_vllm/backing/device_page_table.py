"""The page table on the device, where kernels resolve handles.

One int32 tensor holds both pools, as ``avmp_kernels`` defines it. Move plans write to it in stream
order: a step that was launched before still reads the old entries, the next one the new ones, and
nobody waits.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from avmp_kernels.page_table import update
from avmp_kernels.pages import PageTable as KernelPageTable

from avmp_vllm.backing.page_table import PageTable
from avmp_vllm.core import Geometry, Kind, Relocation


class DevicePageTable(PageTable):
    """A worker's page table with a copy on its device.

    Args:
        geometry: Sizes of the arena.
        device: Where the kernels run.

    Attributes:
        resident: int32 ``[KV entries + SSM entries]`` on the device. Its address never changes, so
            captured graphs may read it.
    """

    def __init__(self, geometry: Geometry, device: torch.device) -> None:
        super().__init__(geometry)
        host = torch.from_numpy(np.concatenate([self.entries[kind] for kind in Kind]))
        self.resident = KernelPageTable(host.to(device), len(self.entries[Kind.KV]))

    def apply(self, relocations: Iterable[Relocation]) -> None:
        """Write the entries that relocations swap: one upload and one launch, if there are any."""
        relocations = list(relocations)
        super().apply(relocations)
        update(
            self.resident,
            (
                write
                for move in relocations
                for write in ((move.handle, move.target), (move.displaced, move.source))
            ),
        )

    def warm_up(self) -> None:
        """Compile the kernel that writes entries. Null handles are never written."""
        update(self.resident, [(0, 0)])

    def digest(self, known: dict[Kind, int]) -> int:
        """Checksum of the entries on the device. Waits for it, so only verification may ask."""
        entries = self.resident.entries.cpu().numpy()
        kv, ssm = np.split(entries, [self.resident.num_kv])
        return self._checksum({Kind.KV: kv, Kind.SSM: ssm}, known)
