"""Whom vLLM preempts: it takes the last of its running requests, so their order decides.

With priorities vLLM looks for its victim itself, and the order is of no consequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avmp_vllm import predict

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Victims:
    """Keeps the request that is cheapest to compute again behind the others.

    Among requests that decode the order stays as it is, since each step adds a token to all of
    them; so it is made anew only when one has started, and while a prompt is computed.

    A request is preempted when bytes are short, so what the prefix cache still holds of it is
    about to go, too: all of its tokens count.

    Attributes:
        stale: Whether somebody has started since the order was made, or computes a prompt.
    """

    def __init__(self) -> None:
        #: By request, when it first started. Clocks of clients decide nothing here.
        self._started: dict[str, int] = {}
        self._starts = 0
        self.stale = False

    def admitted(self, request: Request) -> None:
        """A request that waited runs."""
        if request.request_id not in self._started:
            self._started[request.request_id] = self._starts
            self._starts += 1
        self.stale = True

    def left(self, request: Request) -> None:
        """A request's blocks go: it has ended, or waits again."""
        if request.is_finished():
            self._started.pop(request.request_id, None)

    def order(self, running: list[Request]) -> list[Request]:
        """The running requests, the first to preempt last."""
        by_name = {request.request_id: request for request in running}
        ordered = predict.order(map(self._candidate, running))
        self.stale = any(request.is_prefill_chunk for request in running)
        return [by_name[candidate.name] for candidate in ordered]

    def _candidate(self, request: Request) -> predict.Candidate:
        return predict.Candidate(
            request.request_id,
            self._started[request.request_id],
            request.num_computed_tokens,
            request.num_preemptions,
            request.is_prefill_chunk,
        )
