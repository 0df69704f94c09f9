"""How many pages stay free when a waiting request is admitted beside others.

Exact pages leave a request no slack to grow into, so a newcomer must leave room for those that run:
without it the last page would go to the newcomer, and the next token of anybody else would preempt.
How much room is a constant for each of them, or what their answers are forecast to need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from vllm.v1.request import RequestStatus

from avmp_vllm import predict
from avmp_vllm.core.geometry import Geometry, PageGroup, ceil_div
from avmp_vllm.predict.score import Score

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from avmp_vllm.engine.entry.config import AVMPConfig

    Held = Mapping[str, Sequence[KVCacheBlock]]

#: Running answers are looked at every so many steps, to learn that they go on.
LOOK_STEPS = 16
#: With forecasts, a state that moves to a new block within so many tokens has one kept free.
MOVE_TOKENS = 64


def growing(geometry: Geometry) -> list[PageGroup]:
    """Groups of pages of which a request gets more as it grows; a ring does not."""
    return [group for group in geometry.groups if group.most != 1]


class GrowthAdmission:
    """Every running request can still grow by the same number of tokens.

    Args:
        geometry: Of the arena.
        tokens: ``growth_tokens``.
        held: Pages of the requests that hold any, by request.

    Attributes:
        move_tokens: A running state that moves within so many tokens has a block kept free, for
            it holds two while it moves.
        score: Of forecasts, which are not made here.
        reserve: Pages that a newcomer had to leave free, the last time that one asked.
        refusals: Times that a request had to go on waiting for room.
    """

    def __init__(self, geometry: Geometry, tokens: int, held: Held) -> None:
        self._pages = [group.page_tokens for group in growing(geometry)]
        self._held = held
        self._grow_by(tokens)
        self.move_tokens = tokens
        self.score = Score()
        self.reserve = 0
        self.refusals = 0

    def _grow_by(self, tokens: int) -> None:
        """Have room for so many tokens of each request."""
        self._each = sum(ceil_div(tokens, page_tokens) for page_tokens in self._pages)

    def room(self, request: Request) -> int | None:
        """Pages to leave free for the others if a request starts now.

        Args:
            request: That waits.

        Returns:
            The pages, or None if it need not ask: nothing has changed since it was refused.
        """
        self.reserve = len(self._held) * self._each
        return self.reserve

    def refused(self, request: Request) -> None:
        """There was not so much room."""
        self.refusals += 1

    def admitted(self, request: Request, hit: int, tokens: int) -> None:
        """A request that waited runs.

        Args:
            request: The request.
            hit: Of its tokens, those that need not be computed.
            tokens: That it has pages for.
        """

    def left(self, request: Request) -> None:
        """A request's blocks go: it has ended, or waits again."""

    def step(self) -> None:
        """Another step is scheduled."""


class ForecastAdmission(GrowthAdmission):
    """Running requests can still grow by what their answers are forecast to need.

    Args:
        forecaster: Learns from the answers.
        geometry: Of the arena.
        states: Blocks of states that a running request holds.
        risk: ``forecast_risk``.
        held: As above.
    """

    def __init__(
        self,
        forecaster: predict.LengthForecaster,
        geometry: Geometry,
        states: int,
        risk: float,
        held: Held,
    ) -> None:
        super().__init__(geometry, 0, held)
        self.move_tokens = MOVE_TOKENS
        self._page = geometry.page_tokens
        #: Pages of all groups for each page of the first.
        self._tables = sum(self._page / group.page_tokens for group in growing(geometry))
        rings = len(geometry.groups) - len(growing(geometry))
        fixed = states * geometry.block_bytes / geometry.page_bytes + rings
        self._forecaster = forecaster
        self._running = predict.RunningSet(forecaster.bins, self._page, fixed / self._tables)
        self._rule = predict.Admission(self._running, risk)
        self._forecasts: dict[Request, predict.Forecast] = {}
        self._steps = 0
        self.score = forecaster.score

    def room(self, request: Request) -> int | None:
        """Pages to leave free for the others; reckoned once, then not until pages come free."""
        if self._rule.stands(request):
            self.refusals += 1
            return None
        self.look()
        if request not in self._forecasts:
            self._forecasts[request] = self._forecast(request)
        self.reserve = math.ceil(self._rule.reserve() * self._tables)
        return self.reserve

    def look(self) -> None:
        """See what the running requests have by now."""
        running = self._running
        running.generated_by([each.num_output_tokens for each in self._requests()])
        coming: list[Request] = list(running.coming)
        for each in coming:
            running.computed(each, len(self._held[each.request_id]) * self._page)

    def refused(self, request: Request) -> None:
        """There was not so much room; the refusal stands until some comes free."""
        super().refused(request)
        self._rule.refused(request)

    def admitted(self, request: Request, hit: int, tokens: int) -> None:
        """A request that waited runs, and is to be reckoned with."""
        if request in self._running:  # a session's next input, or what a connector was to load
            self._running.remove(request)
        forecast = self._forecasts.get(request)
        if forecast is None or request.resumable:
            forecast = self._forecasts[request] = self._forecast(request)
        shared = sum(
            block.ref_cnt > 1 for block in self._held[request.request_id][: hit // self._page]
        )
        self._running.add(
            request, forecast, request.num_prompt_tokens, request.num_output_tokens, tokens, shared
        )

    def left(self, request: Request) -> None:
        """A request's blocks go. What became of its answer is learned, if it has ended."""
        if request in self._running:
            self._running.remove(request)
            self._rule.freed()
        if not request.is_finished():
            return
        forecast = self._forecasts.pop(request, None)
        if forecast is None or request.resumable:  # of a session only the last answer is left
            return
        ended = request.status == RequestStatus.FINISHED_STOPPED
        learn = self._forecaster.finish if ended else self._forecaster.stop
        learn(forecast, request.num_output_tokens, request.block_hashes)

    def step(self) -> None:
        """Another step is scheduled; now and then, note which answers go on."""
        self._rule.step()
        self._steps += 1
        if self._steps % LOOK_STEPS == 0:
            for request in self._requests():
                forecast = self._forecasts[request]
                if request.num_output_tokens >= forecast.next_progress:
                    self._forecaster.progress(forecast, request.num_output_tokens)

    def _requests(self) -> Sequence[Request]:
        """Those that run, in the order in which the rule knows them."""
        requests: Sequence[Request] = self._running.names
        return requests

    def _forecast(self, request: Request) -> predict.Forecast:
        """What is known of a request's answer; it ends at its limit at the latest."""
        forecast = self._forecaster.arrive(request.num_prompt_tokens, request.block_hashes)
        forecast.cap(request.max_tokens)
        return forecast


def admission_by(
    config: AVMPConfig, geometry: Geometry, states: int, longest: int, held: Held
) -> GrowthAdmission:
    """What decides how much room newcomers leave.

    Args:
        config: AVMP's options.
        geometry: Of the arena.
        states: Blocks of states that a running request holds.
        longest: Tokens of the longest request.
        held: Pages of the requests that hold any, by request.
    """
    if config.admission == "growth":
        return GrowthAdmission(geometry, config.growth_tokens, held)
    forecaster = predict.LengthForecaster(longest)
    return ForecastAdmission(forecaster, geometry, states, config.forecast_risk, held)
