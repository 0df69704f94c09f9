"""Decode steps in which a request needs nothing.

Of the sixteen tokens of a page, fourteen go where there is room already: nothing is allocated,
freed, copied or published for them. vLLM's manager asks every cache group each time to find that
out, for every request in every step. Here it is found out once a page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager
    from avmp_vllm.engine.scheduler.state_manager import StateManager


@dataclass(slots=True)
class _Stretch:
    """Tokens of a request for which nothing is to be done.

    Attributes:
        computed: Tokens that are computed once all scheduled steps have run.
        end: The first number of tokens at which something may be due.
        states: Blocks of its running states, by manager.
    """

    computed: int
    end: int
    states: list[int]


class InsidePages:
    """Knows of each running request how far it can go on by itself.

    Args:
        grains: Whenever a request has a multiple of one of these tokens, something may be due:
            tokens of a page, of a block of states, of a hash.
        managers: Of the states. They note where each stands, so it is noted here too.
        caching: Whether full pages are published once their tokens are known.
    """

    def __init__(self, grains: set[int], managers: Sequence[StateManager], caching: bool) -> None:
        self._grains = sorted(grains)
        self._managers = managers
        self._positions = [manager.block_pool.positions for manager in managers]
        self._caching = caching
        self._stretches: dict[str, _Stretch] = {}

    def goes_on(self, request: Request) -> bool:
        """Whether a running request needs nothing for its next token; that is noted if so."""
        stretch = self._stretches.get(request.request_id)
        if stretch is None:
            return False
        tokens = request.num_computed_tokens + 1
        if tokens != stretch.computed + 1 or tokens >= stretch.end:
            del self._stretches[request.request_id]
            return False
        stretch.computed = tokens
        for positions, block in zip(self._positions, stretch.states, strict=True):
            positions[block] = tokens
        return True

    def note(self, request: Request, tokens: int) -> None:
        """A request has slots for so many tokens; see how far it goes from there.

        Steps may be scheduled before the tokens of earlier ones are known. A page whose last token
        is not known is published later, and so are old states let go of: until then nothing is
        noted.
        """
        known = request.num_tokens
        if tokens < known:  # its prompt, or what it had before it was preempted
            return
        if any(tokens % grain == 0 for grain in self._grains):  # the next token begins something
            return
        if self._caching and any(tokens // grain != known // grain for grain in self._grains):
            return
        states = []
        for manager in self._managers:
            block = manager.settled(request.request_id, tokens)
            if block is None:
                return
            states.append(block.block_id)
        end = min((tokens // grain + 1) * grain for grain in self._grains)
        self._stretches[request.request_id] = _Stretch(tokens, end, states)

    def forget(self, request_id: str) -> None:
        """A request's blocks go, it waits, or it gets a chunk of more tokens."""
        self._stretches.pop(request_id, None)


def inside_pages(manager: AVMPBlockSpaceManager) -> InsidePages | None:
    """What spares a manager's steps; None where something may be due in any of them.

    A window lets go of pages wherever a request stands, and drafts take more than one token.
    """
    coordinator = manager.coordinator
    windows = any(group.most is not None for group in manager.geometry.groups)
    if windows or manager.states_each > 1:
        return None
    grains = {each.block_size for each in coordinator.single_type_managers}
    if manager.enable_caching:
        grains.add(manager.block_pool.hash_block_size)
    return InsidePages(grains, coordinator.state_managers, manager.enable_caching)
