"""vLLM's and AVMP's real schedulers over a simulated worker, driven by a stream of events."""

from __future__ import annotations

import bisect
import copy
import functools
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fuzz_stream import Abort, Add, Continue, Reset, Settings, Stream
from fuzz_worker import END_OF_ANSWER, Digests, SimulatedWorker, next_token
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from avmp_vllm.core import ArenaTooSmall
from avmp_vllm.core.capacity import stock_block_tokens
from avmp_vllm.engine.entry import minors
from avmp_vllm.engine.layout.arena import AVMPCacheConfig, arena_configs
from avmp_vllm.engine.layout.limits import fit_model_len
from avmp_vllm.engine.layout.stages import Stage
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler, AVMPScheduler
from avmp_vllm.models.tiny_jamba import tiny_jamba_config

PAGE_TOKENS = 16


class Stuck(AssertionError):
    """Requests that never end."""


@functools.cache
def _base_config() -> VllmConfig:
    with tempfile.TemporaryDirectory() as folder:
        tiny_jamba_config(architectures=["JambaForCausalLM"]).save_pretrained(folder)
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enable_prefix_caching=True,
            max_model_len=256,
            enforce_eager=True,
        ).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def _vllm_config(settings: Settings, avmp: bool) -> VllmConfig:
    config = copy.deepcopy(_base_config())
    config.model_config.max_model_len = settings.max_model_len
    config.cache_config.enable_prefix_caching = settings.caching
    config.cache_config.mamba_cache_mode = "align" if settings.caching else "none"
    config.cache_config.prefix_cache_retention_interval = settings.retention
    scheduler = config.scheduler_config
    scheduler.max_model_len = settings.max_model_len
    scheduler.max_num_batched_tokens = settings.budget
    scheduler.max_num_scheduled_tokens = settings.budget
    scheduler.long_prefill_token_threshold = settings.threshold
    scheduler.max_num_seqs = settings.sequences
    scheduler.policy = settings.policy
    scheduler.async_scheduling = settings.ahead > 0 and settings.asynchronous
    config.parallel_config.pipeline_parallel_size = settings.stages
    if avmp:
        config.additional_config = {
            "block_manager": "avmp",
            "avmp": {
                "migration_batch": settings.batch,
                "admission": settings.admission,
                "victim": settings.victim,
                "cut_tokens": settings.cut,
                "answer_tokens": settings.answer,
                "cold_states": settings.cold,
                "verify": settings.verify,
            },
        }
        if settings.admission == "growth":
            config.additional_config["avmp"]["growth_tokens"] = settings.growth
    return config


def _specs(settings: Settings, stage: int = 0) -> tuple[FullAttentionSpec, MambaSpec]:
    """One layer of each kind; a token has two cells, a state ``state_cells``, or more later."""
    kv = FullAttentionSpec(
        block_size=PAGE_TOKENS, num_kv_heads=1 + stage % 2, head_size=1, dtype=torch.float64
    )
    ssm = MambaSpec(
        block_size=settings.spacing if settings.caching else settings.max_model_len,
        shapes=((settings.state_cells * (1 + stage),),),
        dtypes=(torch.float64,),
        mamba_cache_mode="align" if settings.caching else "none",
        num_prefill_checkpoint_blocks=int(settings.checkpoints),
        prefill_checkpoint_alignment=1 if settings.checkpoints or settings.anywhere else None,
    )
    return kv, ssm


def _arena_configs(settings: Settings, config: VllmConfig, memory: int) -> list[AVMPCacheConfig]:
    """An arena for each stage; those behind the first have half as many bytes more."""
    stages = []
    for number in range(settings.stages):
        kv, ssm = _specs(settings, number)
        size = memory * (2 + number) // 2
        stages.append(Stage({f"{number}.kv": kv, f"{number}.ssm": ssm}, size))
    return arena_configs(config, stages)


def _cache_configs(
    settings: Settings, config: VllmConfig, memory: int, avmp: bool
) -> Sequence[KVCacheConfig]:
    if avmp:
        caches = _arena_configs(settings, config, memory)
        fit_model_len(config, caches[0])
        return caches
    kv, ssm = _specs(settings)
    block = stock_block_tokens(
        PAGE_TOKENS, kv.page_size_bytes, ssm.page_size_bytes, unit=PAGE_TOKENS
    )
    kv = replace(kv, block_size=block)
    ssm = replace(
        ssm,
        block_size=block if settings.caching else settings.max_model_len,
        page_size_padded=kv.page_size_bytes,
    )
    if config.cache_config.prefix_cache_retention_interval:
        # A multiple of the block, which stock has chosen.
        config.cache_config.prefix_cache_retention_interval = 2 * block
    return minors.stock_cache_configs(config, [{"kv": kv, "ssm": ssm}], [memory])


def least_memory(settings: Settings) -> int:
    """Bytes of the smallest arena that AVMP accepts."""
    config = _vllm_config(settings, avmp=True)

    def accepted(size: int) -> bool:
        try:
            fit_model_len(config, _arena_configs(settings, config, size)[0])
        except ArenaTooSmall:
            return False
        return True

    return bisect.bisect_left(range(1 << 24), True, key=accepted)


@dataclass
class Session:
    """A request as its user sees it."""

    asked: Add
    answer: list[int] = field(default_factory=list)
    aborted: bool = False
    finished: bool = False


class Engine:
    """A scheduler and a simulated worker, or one for each pipeline stage.

    Args:
        settings: Of the stream.
        avmp: AVMP's scheduler, or stock vLLM's, over as many bytes.
        check_published: Check the content of the whole prefix cache after each step.
    """

    def __init__(self, settings: Settings, avmp: bool, check_published: bool = True) -> None:
        memory = int(least_memory(settings) * settings.memory_factor)
        self.settings = settings
        config = _vllm_config(settings, avmp)
        kv_cache_utils.init_none_hash(sha256_cbor)
        caches = _cache_configs(settings, config, memory, avmp)
        cache = kv_cache_utils.generate_scheduler_kv_cache_config(list(caches))
        config.cache_config.num_gpu_blocks = cache.num_blocks
        config.cache_config.block_size = min(
            group.kv_cache_spec.block_size for group in cache.kv_cache_groups
        )
        block, hash_block = kv_cache_utils.resolve_kv_cache_block_sizes(cache, config)
        ahead = settings.ahead > 0 and settings.asynchronous
        classes = ((Scheduler, AsyncScheduler), (AVMPScheduler, AVMPAsyncScheduler))
        self.scheduler: Any = classes[avmp][ahead](
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=block,
            hash_block_size=hash_block,
        )
        self._hasher = (
            kv_cache_utils.get_request_block_hasher(hash_block, sha256_cbor)
            if settings.caching
            else None
        )
        self._hash_block = hash_block
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self._salts: dict[str, str | None] = {}
        alignment = managers[0].cache_hit_alignment_tokens
        self.workers = [
            SimulatedWorker(cache, hash_block, alignment, self._salts) for cache in caches
        ]
        self.worker = self.workers[-1]
        self._check_published = check_published and settings.caching
        self._prefixes: dict[bytes, tuple[list[int], int]] = {}
        self._running: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()
        self.sessions: dict[str, Session] = {}
        self.steps = 0

    # -- events ------------------------------------------------------------------------------------

    def apply(self, event: Any) -> None:
        """Let an event of the stream happen."""
        match event:
            case Add():
                self._salts[event.name] = event.salt
                self.sessions[event.name] = Session(event)
                self.scheduler.add_request(
                    self._request(
                        event.name,
                        event.prompt,
                        event.limit,
                        event.salt,
                        event.priority,
                        event.session,
                    )
                )
            case Continue() if self._is_open(event.name):
                self._continue(event)
            case Abort():
                if self.scheduler.finish_requests(event.name, RequestStatus.FINISHED_ABORTED):
                    self.sessions[event.name].aborted = True
            case Reset():
                self.scheduler.reset_prefix_cache(reset_running_requests=event.running)

    def _is_open(self, name: str) -> bool:
        request = self.scheduler.requests.get(name)
        return request is not None and request.resumable

    def _request(
        self,
        name: str,
        prompt: tuple[int, ...],
        limit: int,
        salt: str | None,
        priority: int,
        session: bool,
    ) -> Request:
        return Request(
            request_id=name,
            prompt_token_ids=list(prompt),
            sampling_params=self._sampling(limit),
            pooling_params=None,
            arrival_time=float(len(self.sessions)),
            cache_salt=salt,
            priority=priority,
            block_hasher=self._hasher,
            resumable=session,
        )

    def _continue(self, event: Continue) -> None:
        """The next input of a streaming session, or its end."""
        ends = event.prompt is None
        request = self.scheduler.requests[event.name]
        queued = sum(
            len(update.prompt_token_ids) + update.max_tokens
            for update in request.streaming_queue
            if update
        )
        room = self.settings.max_model_len - request.num_tokens - request.max_tokens - queued - 6
        if not ends and room < len(event.prompt):
            return
        self.scheduler.add_request(
            self._request(
                event.name, event.prompt or (1,), 5, self._salts[event.name], 0, session=not ends
            )
        )

    def _sampling(self, limit: int) -> SamplingParams:
        parameters = SamplingParams(max_tokens=limit)
        parameters.update_from_generation_config({}, END_OF_ANSWER)
        return parameters

    # -- steps -------------------------------------------------------------------------------------

    def step(self) -> None:
        """Schedule and execute a step; hand over the output of the one that is old enough."""
        self.steps += 1
        output = self.scheduler.schedule()
        self._note_prefixes()
        for worker in self.workers:
            tokens = worker.execute(output)
            if self._check_published:
                worker.check_published(self.scheduler, self._prefixes)
        idle = not output.num_scheduled_tokens
        if not idle:
            self._running.append((output, tokens))
        if self._running and (idle or len(self._running) > self.settings.ahead):
            self._hand_over()

    def _hand_over(self) -> None:
        outputs = self.scheduler.update_from_output(*self._running.popleft())
        for batch in outputs.values():
            for one in batch.outputs:
                session = self.sessions[one.request_id]
                session.answer += one.new_token_ids
                session.finished |= one.finish_reason is not None
        self._note_prefixes()

    def _note_prefixes(self) -> None:
        """Remember what every block hash stands for."""
        for name, request in self.scheduler.requests.items():
            count = len(request.block_hashes)
            if count and bytes(request.block_hashes[-1]) in self._prefixes:
                continue
            digests = Digests(self._salts[name])
            digests.follow(list(request.all_token_ids)[: count * self._hash_block])
            for index, block_hash in enumerate(request.block_hashes):
                self._prefixes.setdefault(
                    bytes(block_hash), (digests.of, (index + 1) * self._hash_block)
                )

    def run(self, stream: Stream) -> None:
        """Run a stream to its end.

        Raises:
            WrongContent: Something was read or published that is not what it should be.
            Stuck: Requests do not end.
        """
        for events in stream.steps:
            for event in events:
                self.apply(event)
            if self.scheduler.has_requests():
                self.step()
        for name, session in self.sessions.items():
            if session.asked.session:
                self.apply(Continue(name, None))
        idle = 0
        before = None
        limit = 400 + 40 * sum(
            s.asked.limit + len(s.asked.prompt) // 16 for s in self.sessions.values()
        )
        while self.scheduler.has_unfinished_requests() or self._running:
            self.step()
            now = [(s.finished, len(s.answer)) for s in self.sessions.values()]
            idle = idle + 1 if now == before else 0
            before = now
            if idle > 300 or self.steps > limit:
                running = [request.request_id for request in self.scheduler.running]
                waiting = len(self.scheduler.waiting)
                raise Stuck(f"after {self.steps} steps, {running} running, {waiting} waiting")

    def check_answers(self) -> None:
        """Compare every answer with what the model says."""
        for name, session in self.sessions.items():
            asked = session.asked
            if asked.session:
                continue  # the worker has checked every token that a later input builds upon
            tokens, answer = list(asked.prompt), []
            digests = Digests(asked.salt)
            while len(answer) < len(session.answer):
                digests.follow(tokens)
                answer.append(next_token(digests.of[-1]))
                tokens.append(answer[-1])
            assert session.answer == answer, f"{name}: {session.answer} instead of {answer}"
            if not session.aborted:
                assert session.finished, f"{name} has not finished"
                room = self.settings.max_model_len - len(asked.prompt)
                full = len(session.answer) == min(asked.limit, room)
                assert full or answer[-1] == END_OF_ANSWER, f"{name} ended early: {answer}"
