"""Which transfers must end before a step's plan touches their bytes.

vLLM waits for a store whose block it hands out again. It knows blocks by their ids, and here a
block's bytes also change hands when a page moves, and when capacity goes from one pool to the
other. So each step's transfers are remembered by their places, and those whose bytes the next plan
touches join vLLM's own list of transfers to wait for, which every worker honours before the plan.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Sequence
from typing import TYPE_CHECKING

from avmp_vllm.core import Relocation, kind_of
from avmp_vllm.core.transfers import NotingArena, Place, Transfers

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
        OffloadingConnectorMetadata,
        TransferJob,
    )


class Fence:
    """Keeps transfers and move plans apart.

    Args:
        arena: The allocator.

    Attributes:
        transfers: That may be under way.
    """

    def __init__(self, arena: NotingArena) -> None:
        self.transfers = Transfers(arena.geometry)
        self._arena = arena

    def end_step(
        self,
        metadata: OffloadingConnectorMetadata,
        moves: Sequence[Relocation],
        finished: Collection[str],
        live: Container[int],
    ) -> None:
        """Add to a step's list of transfers to wait for, and remember those that it begins.

        Workers submit a step's loads and stores behind its forward pass, so those of running
        requests are where this step's plan leaves them. A request that has ended holds nothing any
        more: what it stores is where it was before the plan.

        Args:
            metadata: Of the step, which has been scheduled.
            moves: Relocations of its plan.
            finished: Requests that ended before it.
            live: Transfers that no worker has reported as ended.
        """
        arena, transfers = self._arena, self.transfers
        transfers.end_all_but(live)
        before: dict[int, int] = {}
        touched: list[Place] = []
        for move in moves:
            before.setdefault(move.handle, move.source)
            before.setdefault(move.displaced, move.target)
            touched += (Place(move.kind, move.source), Place(move.kind, move.target))
        touched += self._places(filter(arena.inside, arena.take_taken()))
        ended = {
            number: job for number, job in metadata.store_jobs.items() if job.req_id in finished
        }
        for number, job in ended.items():
            places = [
                Place(kind_of(handle), before.get(handle, arena.physical(handle)))
                for handle in handles_of(job)
            ]
            transfers.begin(number, places)
        flush = metadata.jobs_to_flush
        if flush is None:
            flush = metadata.jobs_to_flush = set()
        found = transfers.holding(touched) - flush
        arena.waits += len(found)
        flush |= found
        for number in flush:
            transfers.end(number)
        for jobs in (metadata.load_jobs, metadata.store_jobs):
            for number, job in jobs.items():
                if number not in ended and number not in flush:
                    transfers.begin(number, self._places(handles_of(job)))

    def _places(self, handles: Iterable[int]) -> list[Place]:
        return [Place(kind_of(handle), self._arena.physical(handle)) for handle in handles]


def handles_of(job: TransferJob) -> list[int]:
    """Handles of the pages that a transfer reads or writes in the arena."""
    spec = job.src_spec if hasattr(job.src_spec, "group_sizes") else job.dst_spec
    return [int(handle) for handle in spec.block_ids]
