"""The paper's four workloads: who arrives when, with how long a prompt and answer.

Draws are vectorised and taken in the order of the paper's code from ``numpy``'s `default_rng`, so a
workload name and a seed give the published trace. One tick is one token. A request departs at
``arrival + prompt + generated``: the prompt costs a tick a token, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avmp_vllm.bench.inputs import InputError, read_table

#: Seeds per workload; they are consecutive.
SEEDS = 3

SHAREGPT_FILE = "sharegpt_prompt_tokens.csv"


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        workload: Name.
        seed: Of the draws.
        arrivals: Ticks, ascending.
        prompts: Prompt tokens.
        generated: Answer tokens.
    """

    workload: str
    seed: int
    arrivals: tuple[int, ...]
    prompts: tuple[int, ...]
    generated: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.arrivals)

    def departure(self, request: int) -> int:
        """Tick at which a request is done if it never waits."""
        return self.arrivals[request] + self.prompts[request] + self.generated[request]


Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray, np.ndarray]]


def _uniform_short(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    prompts = rng.integers(128, 1024, 512, endpoint=True)
    generated = rng.integers(64, 256, 512, endpoint=True)
    return np.arange(512), prompts, generated


def _mixed_long(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    is_long = rng.random(256) < 0.2
    short = rng.integers(512, 4096, 256, endpoint=True)
    long = rng.integers(16384, 65536, 256, endpoint=True)
    generated = rng.integers(128, 512, 256, endpoint=True)
    return np.arange(256), np.where(is_long, long, short), generated


def _agentic_burst(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrivals = np.ceil(np.cumsum(rng.exponential(0.1, 256))).astype(np.int64)
    prompts = np.clip(rng.lognormal(8.5, 1.0, 256).astype(np.int64), 64, 65536)
    generated = rng.integers(64, 256, 256, endpoint=True)
    return arrivals, prompts, generated


def _sharegpt_replay(counts: np.ndarray) -> Draw:
    def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prompts = np.clip(rng.choice(counts, 512, replace=True), 16, 4096)
        generated = np.clip(rng.lognormal(4.5, 1.0, 512).astype(np.int64), 32, 2048)
        return np.arange(512), prompts, generated

    return draw


_BASE_SEED = {"uniform_short": 1, "mixed_long": 2, "agentic_burst": 3, "sharegpt_replay": 4}
_SYNTHETIC: dict[str, Draw] = {
    "uniform_short": _uniform_short,
    "mixed_long": _mixed_long,
    "agentic_burst": _agentic_burst,
}

SYNTHETIC = tuple(_SYNTHETIC)
SHAREGPT = "sharegpt_replay"


def seeds(workload: str) -> range:
    """The published seeds of a workload."""
    return range(_BASE_SEED[workload], _BASE_SEED[workload] + SEEDS)


def read_sharegpt_counts(path: Path) -> np.ndarray:
    """Read the ordered list of ShareGPT prompt lengths.

    Raises:
        InputError: The file is missing or a line is not ``index,prompt_tokens``; with the line.
    """
    counts: list[int] = []
    for line, row in read_table(path, ("index", "prompt_tokens")):
        if row["index"] != str(len(counts)) or not row["prompt_tokens"].isdigit():
            found = f"{row['index']},{row['prompt_tokens']}"
            raise InputError(path, line, f"want '{len(counts)},<prompt tokens>', found {found!r}")
        counts.append(int(row["prompt_tokens"]))
    if not counts:
        raise InputError(path, 1, "holds no prompt lengths")
    return np.array(counts, dtype=np.int64)


def make_trace(workload: str, seed: int, sharegpt_counts: np.ndarray | None = None) -> Trace:
    """Draw one trace.

    Args:
        workload: One of `SYNTHETIC` or `SHAREGPT`.
        seed: Of the generator.
        sharegpt_counts: Needed for ShareGPT only, see `read_sharegpt_counts`.
    """
    if workload == SHAREGPT:
        if sharegpt_counts is None:
            raise ValueError("sharegpt_replay needs the ShareGPT prompt lengths")
        draw = _sharegpt_replay(sharegpt_counts)
    else:
        draw = _SYNTHETIC[workload]
    arrivals, prompts, generated = draw(np.random.default_rng(seed))
    return Trace(
        workload,
        seed,
        tuple(arrivals.tolist()),
        tuple(prompts.tolist()),
        tuple(generated.tolist()),
    )
