"""One workload over several engines: slices in turn, figures, and whether tokens are equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from avmp_vllm.bench.engine.workloads import DECODE, JOIN, PREFILL, Workload

Tokens = list[list[int]]


class Engine(Protocol):
    """Takes orders."""

    def order(self, **order: Any) -> dict[str, Any]:
        """Carry one out."""


def turns(names: Sequence[str], number: int) -> list[str]:
    """The order of slice (or round) ``number``: forwards and backwards in turn."""
    return list(names) if number % 2 else list(reversed(names))


def measure(
    workload: Workload,
    engines: Mapping[str, Engine],
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Drive a workload once on each engine, slice by slice in turn.

    Args:
        workload: What to drive.
        engines: By variant.
        seed: Of the prompts; also decides who is first.
        advance: Called after every slice of every engine.

    Returns:
        ``figures`` and ``tokens`` by variant. Times in ms.
    """
    names = list(engines)
    work = asdict(workload)
    slices: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    ends: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    beside = workload.kind in (DECODE, JOIN)
    if beside:
        for name in turns(names, seed):
            engines[name].order(do="begin", workload=work, seed=seed, prefill=True)
    for number in range(workload.slices):
        # Prompts of its own for each slice, so that a prefix cache finds nothing of another's.
        key = seed * workload.slices + number
        for name in turns(names, seed + number):
            engine = engines[name]
            if workload.kind == DECODE:
                slices[name].append(engine.order(do="steps", count=workload.slice_steps))
            elif workload.kind == JOIN:
                slices[name].append(engine.order(do="joins", workload=work, seed=key))
            else:
                only = workload.kind == PREFILL
                slices[name].append(engine.order(do="begin", workload=work, seed=key, prefill=only))
                ends[name].append(engine.order(do="finish"))
            advance()
    if beside:
        for name in names:
            ends[name].append(engines[name].order(do="finish"))
    return {
        name: {
            "figures": _figures(workload, slices[name], ends[name]),
            "tokens": [tokens for end in ends[name] for tokens in end["tokens"]],
        }
        for name in names
    }


def _figures(
    workload: Workload, slices: list[dict[str, Any]], ends: list[dict[str, Any]]
) -> dict[str, float]:
    counted = ends[0]["counters"]
    figures = {name: sum(end["counters"][name] for end in ends) for name in counted}
    if workload.kind == DECODE:
        seconds = [value for part in slices for value in part["seconds"]]
        figures |= {
            "step_mean_ms": 1e3 * float(np.mean(seconds)),
            "step_p50_ms": 1e3 * float(np.median(seconds)),
            "step_p99_ms": 1e3 * float(np.percentile(seconds, 99)),
            "cpu_ms": 1e3 * sum(part["cpu_s"] for part in slices) / len(seconds),
        }
    elif workload.kind == JOIN:
        seconds = [value for part in slices for value in part["seconds"]]
        first = [value for part in slices for value in part["seconds"][::2]]
        onward = [value for part in slices for value in part["seconds"][1::2]]
        steps = [value for part in slices for value in part["steps"]]
        figures |= {
            "ttft_ms": 1e3 * float(np.mean(first)),
            "ttft_on_ms": 1e3 * float(np.mean(onward)),
            "ttft_p50_ms": 1e3 * float(np.median(seconds)),
            "steps": float(np.mean(steps)),
        }
    elif workload.kind == PREFILL:
        figures["ttft_ms"] = 1e3 * float(np.mean([part["seconds"] for part in slices]))
    else:
        tokens = sum(len(one) for end in ends for one in end["tokens"])
        seconds = [part["seconds"] for part in (*slices, *ends)]
        figures["at_once"] = max(end["at_once"] for end in ends)
        figures["throughput"] = tokens / sum(seconds)
        figures["cpu_ms_per_token"] = 1e3 * sum(end["cpu_s"] for end in ends) / tokens
    return figures


def agreement(expected: Tokens, found: Tokens) -> dict[str, Any]:
    """How far two engines' tokens agree.

    Returns:
        ``requests``, how many of them are ``equal``, and ``first_difference``, the least position
        (from 0) at which an answer differs, or None.
    """
    places = []
    for one, other in zip(expected, found, strict=True):
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            shorter = min(len(one), len(other))
            places.append(next((i for i, (a, b) in pairs if a != b), shorter))
    return {
        "requests": len(expected),
        "equal": len(expected) - len(places),
        "first_difference": min(places, default=None),
    }


def compared(measured: Mapping[str, Mapping[str, Any]], base: str) -> dict[str, dict[str, Any]]:
    """Put each variant's agreement with the base in the place of its tokens.

    Returns:
        ``figures`` and ``counts`` by variant; the base's counts hold a digest of its tokens,
        and how many different ones there are: answers that are all alike would show little.
    """
    expected: Tokens = measured[base]["tokens"]
    found = {}
    for name, one in measured.items():
        if name == base:
            digest = hashlib.sha256(json.dumps(expected).encode()).hexdigest()
            counts: dict[str, Any] = {
                "requests": len(expected),
                "sha256": digest,
                "distinct_tokens": len({token for one in expected for token in one}),
            }
        else:
            counts = agreement(expected, one["tokens"])
        found[name] = {"figures": one["figures"], "counts": counts}
    return found
