"""Streaming sessions, whose requests pause between inputs and keep their blocks meanwhile.

vLLM lets a paused session go on where its tokens end. A state cannot be cut back to there: with
asynchronous scheduling, the step that was in flight when the answer ended has moved it on. And a
paused session's blocks belong to nobody who could be preempted, so that resets fail and others may
wait for ever. In all three cases a session starts over here: its blocks go, and its tokens are
computed again or found in the prefix cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.v1.request import Request, StreamingUpdate

    from avmp_vllm.engine.scheduler.manager import AVMPBlockSpaceManager


class StreamingSessions(Scheduler):
    """What AVMP changes about streaming sessions."""

    kv_cache_manager: AVMPBlockSpaceManager

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        super()._update_request_as_session(session, update)
        if self.kv_cache_manager.state_position(session) != session.num_computed_tokens:
            self._start_over(session)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Reset the prefix cache; the blocks of paused sessions are no obstacle."""
        self.release_paused()
        return super().reset_prefix_cache(*args, **kwargs)

    def release_paused(self) -> None:
        """Let every request start over that holds blocks and does not run.

        Not those whose blocks a KV connector fills: they go on, or go, when it has done so.
        """
        for request in self.requests.values():
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS or request.is_finished():
                continue
            if request.status != RequestStatus.RUNNING and self.kv_cache_manager.holds(request):
                self._start_over(request)

    def loading(self) -> bool:
        """Whether a KV connector fills a request's blocks, which a step may wait for."""
        return self.connector is not None and any(
            request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
            for request in self.kv_holding_waiting
        )

    def _start_over(self, session: Request) -> None:
        """Give a session's blocks back.

        A session without an input keeps the count of its computed tokens: with the next input vLLM
        cuts the answer off there, and finds its blocks gone.
        """
        self.kv_cache_manager.free(session)
        self._inflight_prefills.discard(session)
        # Workers forget where the session's state was, as after a preemption.
        self.reset_preempted_req_ids.add(session.request_id)
        if session.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            session.num_computed_tokens = 0
