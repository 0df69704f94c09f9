"""What the scheduler's side and the workers tell each other, beside vLLM's own messages."""

from __future__ import annotations

from typing import NamedTuple

#: Attribute of vLLM's ``SchedulerOutput`` that holds the step's move plan; pickled with it.
PLAN = "avmp_move_plan"

#: Method of the workers by which memory is created and given back; see `WorkerMemory`.
RESIZE = "resize_arena"


class WorkerMemory(NamedTuple):
    """The memory of an elastic arena in one worker.

    Attributes:
        exists: Bytes that exist.
        wanted: Bytes that were last asked for; more than exist if the system had no more.
        mapped: Bytes that are mapped.
        given_back: Bytes given back since the start.
        fence_waits: Times that a step waited for a fence.
        calls: Calls of the driver since the start, in the order of `CALLS`.
    """

    exists: int
    wanted: int
    mapped: int
    given_back: int
    fence_waits: int
    calls: tuple[int, ...]


#: Kinds of driver calls.
CALLS = ("create", "map", "allow", "unmap", "release")
