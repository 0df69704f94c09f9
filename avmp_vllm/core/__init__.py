"""The allocator: exact page sizes, two pools in one arena, capacity that migrates on failure; and
which states a prefix cache keeps in it.

Standard library only. One concept a file:

============== ===========================================================================
geometry       byte sizes and index ranges of an arena
pipeline       the same of several pipeline stages, taken together
handles        32-bit names of pages
band           the pages of one pool: placement, page table, growth, shrinking
arena          both bands and the gap: allocate, free, migrate, relocate, evict, verify
extents        which bytes of an elastic arena must have memory
plan           what a worker must do to the bytes before its next forward pass
integrity      every invariant of an arena, checked
statistics     counters
prefix_tree    the prefixes that are kept: states, and the pages that they need
hazards        rates of reuse by age: counts, what is thought of them, what follows
recent         what was learned lately, and whether it contradicts what was learned before
reuse          how soon a state is used again, learned from what has been used
keeper         which states are worth their bytes: what is made, and what goes first
cold           blocks that hold two kept states each, encoded
tables         which layers share a block table, and how wide a page of several tables is
transfers      pages that something else reads or writes, and what must wait for it
host_cache     pages and states on the host, in the same rows
caches         what a model's layers keep, and the arena that holds it
capacity       how much fits into the same bytes, by stock vLLM's plan and others
stock          stock vLLM's plan for layers of several layouts
============== ===========================================================================
"""

from avmp_vllm.core.arena import AllocationFailure, Arena, InvariantViolation
from avmp_vllm.core.extents import Extents, Stage
from avmp_vllm.core.geometry import ArenaTooSmall, Geometry, PageGroup
from avmp_vllm.core.handles import ID_MASK, SSM_TAG, Kind, kind_of
from avmp_vllm.core.pipeline import PipelineGeometry
from avmp_vllm.core.plan import Copy, MovePlan, Recode, Relocation, Save
from avmp_vllm.core.statistics import Statistics

__all__ = [
    "ID_MASK",
    "SSM_TAG",
    "AllocationFailure",
    "Arena",
    "ArenaTooSmall",
    "Copy",
    "Extents",
    "Geometry",
    "InvariantViolation",
    "Kind",
    "MovePlan",
    "PageGroup",
    "PipelineGeometry",
    "Recode",
    "Relocation",
    "Save",
    "Stage",
    "Statistics",
    "kind_of",
]
