"""Times on a GPU, and the floors they are held against.

A launch is captured into a CUDA graph and the graph is replayed, so that no time of the host is in
the figure, and so that every kernel measured is shown to be capturable. Between two replays the L2
is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton.testing

_COPY_BYTES = 1 << 30
_MATRIX = 8192


class Time(NamedTuple):
    """Seconds: the median of many replays, and the 20% and 80% quantiles."""

    median: float
    low: float
    high: float


class Limits(NamedTuple):
    """What the card reaches with the plainest work there is.

    Attributes:
        copy: Bytes a second of a large copy, read and written bytes both counted.
        matrix: Operations a second of a large bf16 matrix product.
    """

    copy: float
    matrix: float

    def floor(self, moved: float, operations: float = 0.0) -> float:
        """Return the least seconds for moving bytes and doing matrix operations at once."""
        return max(moved / self.copy, operations / self.matrix)


def time_launch(launch: Callable[[], object], milliseconds: int = 100) -> Time:
    """Capture a launch and time its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = triton.testing.do_bench(graph.replay, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    return Time(*(milli * 1e-3 for milli in times))


def measure_limits() -> Limits:
    """Measure copy bandwidth and matrix rate of the current device.

    In a graph a plain copy may go to an engine of its own, which is slower than kernels that copy
    (on an H200 by a third); so one of those counts as well.
    """
    source, target = torch.empty(2, _COPY_BYTES // 4, dtype=torch.int32, device="cuda")
    copy = min(
        time_launch(lambda: target.copy_(source)),
        time_launch(lambda: torch.bitwise_not(source, out=target)),
    )
    left, right = torch.randn(2, _MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda")
    product = torch.empty_like(left)
    matrix = time_launch(lambda: torch.mm(left, right, out=product))
    return Limits(2 * _COPY_BYTES / copy.median, 2 * _MATRIX**3 / matrix.median)
