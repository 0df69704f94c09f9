"""The paper's grids: which cells each published sweep has.

A cell is one replay: variant, workload, model, GiB, seed. Cells that several sweeps share are
replayed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from avmp_vllm.bench.paper.allocators import ALIASES, BATCHES, THRESHOLDS
from avmp_vllm.bench.paper.models import MODELS
from avmp_vllm.bench.paper.workloads import SHAREGPT, SYNTHETIC, seeds

GIB = 1 << 30


class Cell(NamedTuple):
    """One replay."""

    variant: str
    workload: str
    model: str
    gib: int
    seed: int

    @property
    def key(self) -> str:
        """Name in journals and result files."""
        return f"{self.variant}/{self.workload}/{self.model}/{self.gib}GiB/seed{self.seed}"

    @property
    def source(self) -> Cell:
        """The cell whose replay stands for this one (published aliases decide the same)."""
        return self._replace(variant=ALIASES.get(self.variant, self.variant))


class Sweep(NamedTuple):
    """One grid of the paper."""

    variants: tuple[str, ...]
    gib: tuple[int, ...]
    workloads: tuple[str, ...] = SYNTHETIC

    def cells(self) -> Iterator[Cell]:
        """All cells, seeds innermost."""
        for variant in self.variants:
            for workload in self.workloads:
                for model in MODELS:
                    for gib in self.gib:
                        for seed in seeds(workload):
                            yield Cell(variant, workload, model, gib, seed)


_STATIC = ("padded_unified", "fixed_dual_mr05", "fixed_dual_mr09", "avmp_static_mr05")
_HALF = ("padded_unified", "fixed_dual_mr05", "avmp_static_mr05")
HEADLINE_VARIANTS = (*_STATIC, "avmp_dynamic_b128")

#: By the labels of the published tables; `grid270` is the 270-cell grid of the paper's text.
SWEEPS: dict[str, Sweep] = {
    "throughput": Sweep(HEADLINE_VARIANTS, (1, 4)),
    "grid270": Sweep(HEADLINE_VARIANTS, (1, 4, 8)),
    "sharegpt": Sweep(HEADLINE_VARIANTS, (1, 4), (SHAREGPT,)),
    "batchsize": Sweep((*_HALF, *(f"avmp_dynamic_b{batch}" for batch in BATCHES)), (1, 4)),
    "threshold": Sweep((*_HALF, *(f"avmp_dynamic_b128_{name}" for name in THRESHOLDS)), (1, 4)),
    "timedecomp": Sweep(HEADLINE_VARIANTS, (1, 4)),
    "triton216": Sweep((*HEADLINE_VARIANTS, "avmp_dynamic_b128_triton"), (1, 4)),
    "gpu180_b1": Sweep((*_STATIC, "avmp_dynamic_mr05"), (1, 4)),
    "cpu216_v1": Sweep(_STATIC, (1, 4, 8)),
    "cpu270_b1": Sweep((*_STATIC, "avmp_dynamic_mr05"), (1, 4, 8)),
}

#: What runs unless `--full` asks for everything.
DEFAULT_SWEEPS = ("throughput", "grid270", "sharegpt")


def replays(names: Iterable[str], without_sharegpt: bool = False) -> list[Cell]:
    """Distinct replays that some sweeps need, in a fixed order."""
    found: dict[Cell, None] = {}
    for name in names:
        for cell in SWEEPS[name].cells():
            if not (without_sharegpt and cell.workload == SHAREGPT):
                found.setdefault(cell.source)
    return list(found)
