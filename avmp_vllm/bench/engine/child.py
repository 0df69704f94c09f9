"""One engine behind a pipe: ``python -m avmp_vllm.bench.engine.child``.

Orders come in on standard input, a JSON object a line, and each is answered by one on what standard
output was at the start; all else that is printed goes to standard error. An engine that waits for
an order takes no processor time.

======== ==================================================================================
start    make the engine; the answer says what it is
begin    add a workload's requests; with ``prefill``, step until each has its first token
steps    a slice of pure decode steps, each timed
joins    prompts that join those that decode, one after the other, each timed to its token
finish   step until all requests have ended; the answer has their tokens
======== ==================================================================================
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from avmp_vllm.bench.engine.workloads import DROPPED, JOIN_GAP, Workload
from avmp_vllm.bench.in_process import engine_in_process

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

#: Counters of vLLM and AVMP -> names here.
COUNTERS = {
    "vllm:num_preemptions": "preemptions",
    "vllm:avmp_migrations": "migrations",
    "vllm:avmp_relocated_bytes": "relocated_bytes",
    "vllm:avmp_driver_calls": "driver_calls",
    "vllm:prefix_cache_hits": "hits",
}


class NotPureDecode(RuntimeError):
    """A step that should have given each request one token did not."""


def greedy(answer: int) -> SamplingParams:
    """How an answer of so many tokens is sampled; made before a clock runs."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0,
        max_tokens=answer,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


class Session:
    """Drives an engine.

    Args:
        llm: Whose core runs in this process.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm, self._engine = llm, llm.llm_engine
        self._scheduler = self._engine.engine_core.engine_core.scheduler
        self._peak = 0
        self._vocabulary = llm.model_config.get_vocab_size()
        self._tokens: dict[str, list[int]] = {}
        self._finished = 0
        self._count = 0
        self._before: dict[str, float] = {}

    def begin(self, workload: dict[str, Any], seed: int, prefill: bool) -> dict[str, Any]:
        """Add a workload's requests.

        Returns:
            ``seconds`` until each had its first token; of adding them only without ``prefill``.
        """
        work = Workload(**workload)
        prompts, sampling = work.prompts(seed, self._vocabulary), greedy(work.answer)
        self._tokens, self._finished, self._before = {}, 0, self._counters()
        self._peak = 0
        begin = time.perf_counter()
        for prompt in prompts:
            self._add(prompt, sampling)
        while prefill and not all(self._tokens.values()):
            self._step()
        return {"seconds": time.perf_counter() - begin}

    def steps(self, count: int) -> dict[str, Any]:
        """Run decode steps; the first few are not counted.

        Returns:
            ``seconds`` of each step and ``cpu_s``, the processor time of them all.

        Raises:
            NotPureDecode: A request got no token, or ended.
        """
        seconds: list[float] = []
        cpu = time.process_time()
        for number in range(DROPPED + count):
            if number == DROPPED:
                cpu = time.process_time()
            begin = time.perf_counter()
            got = self._step()
            while not got and self._engine.has_unfinished_requests():
                got = self._step()  # asynchronous scheduling fills its queue first
            seconds.append(time.perf_counter() - begin)
            if got != len(self._tokens) or self._finished:
                raise NotPureDecode(
                    f"{got} of {len(self._tokens)} requests got a token and {self._finished} have "
                    "ended where all were to decode: give the engines more cache (--ample-mib) or "
                    "allow more requests at a time"
                )
        return {"seconds": seconds[DROPPED:], "cpu_s": time.process_time() - cpu}

    def joins(self, workload: dict[str, Any], seed: int) -> dict[str, Any]:
        """Have prompts join the requests that decode, one after the other.

        Returns:
            ``seconds`` from each prompt's arrival to its token, and the ``steps`` it took.

        Raises:
            NotPureDecode: The requests beside them have ended.
        """
        work, sampling = Workload(**workload), greedy(1)
        seconds, steps = [], []
        for prompt in work.joiners(seed, self._vocabulary):
            begin = time.perf_counter()
            name = self._add(prompt, sampling)
            count = 0
            while not self._tokens[name]:
                self._step()
                count += 1
            seconds.append(time.perf_counter() - begin)
            steps.append(count)
            for _ in range(JOIN_GAP):
                self._step()
        if self._finished > len(self._tokens) - work.requests:
            raise NotPureDecode("requests that were to decode all the time have ended")
        return {"seconds": seconds, "steps": steps}

    def finish(self) -> dict[str, Any]:
        """Run until nothing is left.

        Returns:
            ``seconds`` and ``cpu_s`` of that, ``tokens`` of each request, the most requests that
            ran ``at_once``, and ``counters`` since the workload began.
        """
        begin, cpu = time.perf_counter(), time.process_time()
        while self._engine.has_unfinished_requests():
            self._step()
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        now = self._counters()
        return {
            "seconds": seconds,
            "cpu_s": cpu,
            "tokens": list(self._tokens.values()),
            "at_once": self._peak,
            "counters": {name: now[name] - self._before.get(name, 0) for name in now},
        }

    def _add(self, prompt: list[int], sampling: SamplingParams) -> str:
        """Add a request; its name."""
        name = str(self._count)
        self._count += 1
        self._tokens[name] = []
        self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        return name

    def _step(self) -> int:
        """Run a step; how many requests got a token."""
        outputs = self._engine.step()
        self._peak = max(self._peak, len(self._scheduler.running))
        for output in outputs:
            self._tokens[output.request_id] += output.outputs[0].token_ids
            self._finished += output.finished
        return len(outputs)

    def _counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if name := COUNTERS.get(metric.name):
                found[name] = found.get(name, 0.0) + metric.value
        return found


def describe(llm: LLM) -> dict[str, Any]:
    """What an engine is made of."""
    config = llm.llm_engine.vllm_config
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    groups = [group for several in runner.attn_groups for group in several]
    mode = config.compilation_config.cudagraph_mode
    found: dict[str, Any] = {
        "runner": type(runner).__name__,
        "scheduler": type(scheduler).__name__,
        "backends": sorted({group.backend.__name__ for group in groups}),
        "eager": config.model_config.enforce_eager,
        "cudagraph_mode": "NONE" if mode is None else mode.name,
        "block_tokens": [
            group.kv_cache_spec.block_size for group in scheduler.kv_cache_config.kv_cache_groups
        ],
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
    }
    if runner.device.type == "cuda":
        from avmp_vllm.bench import card

        found["card"] = card.describe(runner.device)
    return found


def memory() -> tuple[int, int]:
    """Free bytes of what holds weights and cache, and bytes that this process takes of it (CPU)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], 0
    import psutil

    return psutil.virtual_memory().available, psutil.Process().memory_info().rss


@contextlib.contextmanager
def started(order: dict[str, Any]) -> Iterator[tuple[Session, dict[str, Any]]]:
    """Make the engine that a start order asks for, and what to answer.

    Args:
        order: ``model``, ``random_weights`` and ``options`` of ``vllm.LLM``.
    """
    options = order["options"]
    # No prompt is text, and a model that is only a config has no tokenizer.
    options["skip_tokenizer_init"] = True
    if order["random_weights"]:
        # Set before vLLM is imported, as in `engine_in_process`.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from avmp_vllm.bench.engine.weights import LOAD_FORMAT

        options["load_format"] = LOAD_FORMAT
    before, _ = memory()
    with engine_in_process(order["model"], **options) as llm:
        after, own = memory()
        answer = describe(llm) | {"free_bytes": after, "used_bytes": own or before - after}
        yield Session(llm), answer


def main() -> None:
    """Answer orders until there are no more."""
    replies: TextIO = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(answer: dict[str, Any]) -> None:
        replies.write(json.dumps(answer) + "\n")
        replies.flush()

    try:
        with started(json.loads(sys.stdin.readline())) as (session, greeting):
            reply(greeting)
            for line in sys.stdin:
                order = json.loads(line)
                reply(getattr(session, order.pop("do"))(**order))
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
