"""Every family on Model Runner V2 without a GPU: ``python v2_families.py RESULT.json FOLDER``.

The folder holds the checkpoints, by family. See ``v2_process.py``.
"""

from __future__ import annotations

import v2_process  # first: it chooses Triton's interpreter

# isort: split
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from enginelib import engine
from far_states import far_states
from hybrids import COUNT, FAMILIES, LONGEST, NEW_TOKENS, layers_of
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from avmp_vllm.core import Kind, MovePlan

#: Served without a prefix cache too.
UNCACHED = ("kimi_linear", "mixed_mixed")
#: Served with steps scheduled ahead of their predecessors' output.
AHEAD = ("mixed_mixed",)
#: How drafts are made -> bytes of the arena; all but the first by a model of their own.
DRAFTERS = {"mtp": 1_500_000, "eagle": 1_500_000, "eagle3": 1_900_000}


def serve(folder: Path, name: str, caching: bool, **options: Any) -> dict[str, Any]:
    """Serve a family in a tight arena; two rounds where the second may hit a cache."""
    memory = FAMILIES[name].tight
    v2_process.WORKLOADS[name] = (memory, LONGEST, caching, (1, COUNT, NEW_TOKENS))
    with layers_of(name):
        return v2_process.serve(name, str(folder / name), rounds=1 + caching, **options)


def window_not_resolved(folder: Path) -> dict[str, Any]:
    """Kernels find the window's handles in place of its pages."""
    import avmp_vllm.engine.worker.cpu  # noqa: F401  # it comes before the runner's modules

    # isort: split
    from avmp_vllm.engine.worker.v2.block_tables import ArenaBlockTables
    from avmp_vllm.engine.worker.v2.runner import AVMPModelRunnerV2

    made = AVMPModelRunnerV2.initialize_kv_cache
    resolved = ArenaBlockTables.resolve
    windows: list[int] = []

    def make(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        specs = [group.kv_cache_spec for group in config.kv_cache_groups]
        windows[:] = [at for at, spec in enumerate(specs) if isinstance(spec, SlidingWindowSpec)]
        made(self, config, *args, **kwargs)

    def resolve(self: Any, batch: Any) -> Any:
        tables, slots = resolved(self, batch)
        for at in windows:
            rows = self.handles[at][batch.idx_mapping]
            tables[at][: len(rows), : rows.shape[1]] = rows
        return tables, slots

    with (
        mock.patch.object(AVMPModelRunnerV2, "initialize_kv_cache", make),
        mock.patch.object(ArenaBlockTables, "resolve", resolve),
    ):
        return serve(folder, "mixed_window", True, avmp={"verify": False})


def first_layout_alone(folder: Path) -> dict[str, Any]:
    """A relocated state leaves the bytes of its other layouts behind."""
    from avmp_vllm.backing.kernel_buffer import KernelBuffer

    applied = KernelBuffer.apply

    def apply(self: Any, plan: Any) -> None:
        size = self._page_bytes[Kind.SSM]
        for move in plan.relocations:
            before = self._bytes[move.target * size : (move.target + 1) * size].clone()
            applied(self, MovePlan(plan.number, relocations=[move]))
            if move.kind is Kind.SSM:
                kept = FAMILIES["mixed_mixed"].first_layout
                self._bytes[move.target * size + kept : (move.target + 1) * size] = before[kept:]
        applied(self, MovePlan(plan.number, zeros=plan.zeros, copies=plan.copies))

    with mock.patch.object(KernelBuffer, "apply", apply):
        return serve(folder, "mixed_mixed", True, avmp={"verify": False})


def drafting(folder: Path, method: str, avmp: dict[str, Any] | None) -> dict[str, Any]:
    """Qwen3-Next with the layer that it has for drafts, or a drafter beside it; a prefix cache."""
    speculative = {"method": method}
    if method != "mtp":
        speculative["model"] = str(folder / method)
    layers, model = partial(layers_of, "qwen3_next"), str(folder / "mtp")
    return v2_process.drafting(model, avmp, speculative, layers, DRAFTERS[method], count=6)


def refused(folder: Path) -> dict[str, str]:
    """What AVMP's kernels say to families whose pages they do not read."""
    said = {}
    for name in ("mixed_kv", "mixed_window", "kimi_linear"):
        try:
            with (
                layers_of(name),
                engine(str(folder / name), avmp={"kernels": "handles"}, max_model_len=128),
            ):
                said[name] = "started"
        except ValueError as error:
            said[name] = str(error)
            cleanup_dist_env_and_memory()
    return said


def scenarios(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All that this process can do, by name."""
    served = {
        name: partial(serve, folder, name, True, async_scheduling=name in AHEAD)
        for name in FAMILIES
    }
    uncached = {f"{name} uncached": partial(serve, folder, name, False) for name in UNCACHED}
    return {
        **served,
        **uncached,
        "window_not_resolved": partial(window_not_resolved, folder),
        "first_layout_alone": partial(first_layout_alone, folder),
        **{
            f"{method} {side}": partial(drafting, folder, method, avmp)
            for method in DRAFTERS
            for side, avmp in (("stock", None), ("avmp", v2_process.DRAFTING))
        },
        "refused": partial(refused, folder),
        "far_states": far_states,
    }


if __name__ == "__main__":
    v2_process.main(sys.argv[1], scenarios(Path(sys.argv[2])), tuple(sys.argv[3:]))
