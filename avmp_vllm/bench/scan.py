"""``avmp bench scan``: state updates a second of the compiled scan, against a plain torch loop.

A state update is one (channel, state element, step). Everything runs on one core, in one process,
the two sides in turn; the figure is the median of the rounds, in processor time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from avmp_vllm.engine.cpu.scan import selective_scan

_STATE = 16  # elements a channel, as in Jamba and Mamba


class Shape(NamedTuple):
    """A batch: ``sequences`` of ``steps`` tokens each."""

    name: str
    sequences: int
    steps: int
    channels: int


# 256 channels: the tiny Jamba of `avmp tiny-jamba`. 5,120: a Jamba of 3B parameters.
SHAPES = (
    Shape("prefill, tiny", 1, 512, 256),
    Shape("prefill, 3B", 1, 512, 5120),
    Shape("prefill, 3B, ragged", 16, 32, 5120),
    Shape("decode, tiny", 16, 1, 256),
    Shape("decode, 3B", 16, 1, 5120),
    Shape("decode, 3B, one", 1, 1, 5120),
)


def torch_scan(x, dt, A, B, C, state, *, slots, query_start_loc, has_initial_state, D, z, dt_bias):
    """The recurrence as a loop of torch operations, with the arguments of ``selective_scan``.

    Sequences of one length go through the loop together, which is what a batched model would do.
    """
    sequences = len(slots)
    steps = len(x) // sequences
    step = F.softplus(dt + dt_bias).view(sequences, steps, -1)
    drive = (step * x.view(sequences, steps, -1)).unsqueeze(-1)
    B, C = (matrix.view(sequences, steps, 1, -1) for matrix in (B, C))
    h = state[slots] * has_initial_state[:, None, None]
    y = torch.empty_like(step)
    for t in range(steps):
        h = torch.exp(step[:, t].unsqueeze(-1) * A) * h + drive[:, t] * B[:, t]
        y[:, t] = (h * C[:, t]).sum(-1)
    state[slots] = h
    return (y.view_as(x) + D * x) * F.silu(z)


def _inputs(shape: Shape, seed: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Draw the arguments of a scan."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    tokens = shape.sequences * shape.steps
    A = -torch.arange(1.0, _STATE + 1).repeat(shape.channels, 1)
    positional = [normal(tokens, shape.channels), normal(tokens, shape.channels), A]
    positional += [normal(tokens, _STATE), normal(tokens, _STATE)]
    positional += [normal(shape.sequences + 1, shape.channels, _STATE)]
    return positional, {
        "slots": torch.arange(1, shape.sequences + 1),
        "query_start_loc": torch.arange(shape.sequences + 1) * shape.steps,
        "has_initial_state": torch.ones(shape.sequences, dtype=torch.bool),
        "D": torch.ones(shape.channels),
        "z": normal(tokens, shape.channels),
        "dt_bias": torch.full((shape.channels,), -4.0),
    }


def _seconds(function: Callable[[], object]) -> float:
    """Return the processor time of one call, which other programs on the core do not add to."""
    begin = time.thread_time()
    function()
    return time.thread_time() - begin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's arguments."""
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default 15)")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Measure every shape and print a table."""
    torch.set_num_threads(1)
    print("millions of state updates (channel x state x step) a second, one core, fp32")
    print(f"{'shape':<22}{'batch':>20}{'compiled':>10}{'torch':>8}{'ratio':>8}{'max diff':>10}")
    for shape in SHAPES:
        positional, named = _inputs(shape, args.seed)
        *inputs, state = positional
        sides = {"compiled": selective_scan, "torch": torch_scan}
        results = [side(*inputs, state.clone(), **named) for side in sides.values()]  # and warm-up
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.rounds):
            for name, side in sides.items():
                call = functools.partial(side, *inputs, state.clone(), **named)
                times[name].append(_seconds(call))
        updates = shape.sequences * shape.steps * shape.channels * _STATE
        rate = {name: updates / statistics.median(t) / 1e6 for name, t in times.items()}
        print(
            f"{shape.name:<22}{f'{shape.sequences} x {shape.steps} x {shape.channels}':>20}"
            f"{rate['compiled']:>10.0f}{rate['torch']:>8.0f}"
            f"{rate['compiled'] / rate['torch']:>7.1f}x"
            f"{(results[0] - results[1]).abs().max().item():>10.1e}",
            flush=True,
        )
    return 0
