"""What two pages of ``/metrics`` say about the time between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from prometheus_client.parser import text_string_to_metric_families

POOLS = ("kv", "ssm")
DIRECTIONS = ("kv_to_ssm", "ssm_to_kv")
AVMP = "vllm:avmp_"
_CACHE = "vllm:cache_config_info"


class Page:
    """One page of ``/metrics``.

    Args:
        text: The page.
        at_s: When it was read, in seconds of a clock that does not jump.
    """

    def __init__(self, text: str, at_s: float) -> None:
        self.at_s = at_s
        self._samples = [
            sample for family in text_string_to_metric_families(text) for sample in family.samples
        ]

    def value(self, name: str, **labels: str) -> float:
        """Sum over the samples of ``name`` that carry ``labels``; 0 where there is none."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def label(self, name: str, label: str) -> list[str]:
        """Values of a label over the samples of ``name``, each once."""
        found = [s.labels[label] for s in self._samples if s.name == name and label in s.labels]
        return list(dict.fromkeys(found))

    def has(self, prefix: str) -> bool:
        """Whether a sample's name begins so."""
        return any(sample.name.startswith(prefix) for sample in self._samples)


@dataclass(frozen=True)
class Band:
    """One pool's part of the arena, in pages.

    Attributes:
        used: Pages that requests reference.
        cached: Unreferenced pages kept for prefix hits.
        capacity: Pages of the band.
        page_bytes: Bytes of a page; 0 while the band is empty.
    """

    used: int
    cached: int
    capacity: int
    page_bytes: float

    @property
    def capacity_bytes(self) -> float:
        """Bytes of the band."""
        return self.capacity * self.page_bytes

    @property
    def free(self) -> int:
        """Pages that hold nothing."""
        return max(self.capacity - self.used - self.cached, 0)


@dataclass(frozen=True)
class Reading:
    """The state at the end of a window, and what happened in it.

    Args:
        before: The page at its begin.
        now: The page at its end.
    """

    before: Page
    now: Page

    @property
    def seconds(self) -> float:
        """Length of the window."""
        return self.now.at_s - self.before.at_s

    @property
    def model(self) -> str:
        """Name that the server gives the model."""
        return ", ".join(self.now.label("vllm:num_requests_running", "model_name"))

    @property
    def engines(self) -> int:
        """Engines that the figures are summed over."""
        return len(self.now.label("vllm:num_requests_running", "engine"))

    @cached_property
    def bands(self) -> Mapping[str, Band]:
        """The bands of all engines together, by pool."""
        return {pool: self._band(pool) for pool in POOLS}

    def _band(self, pool: str) -> Band:
        used, cached, pages, size = (
            self.now.value(f"{AVMP}{name}", pool=pool)
            for name in ("pages_used", "pages_cached", "capacity_pages", "capacity_bytes")
        )
        return Band(int(used), int(cached), int(pages), size / pages if pages else 0.0)

    @cached_property
    def gap_bytes(self) -> float:
        """Bytes between the bands; 0 if the server does not tell.

        vLLM says how many KV pages would fill the arena, null pages included.
        """
        counts = self.now.label(_CACHE, "num_gpu_blocks")
        kv, ssm = (self.bands[pool] for pool in POOLS)
        if len(counts) != 1 or not counts[0].isdigit() or not (kv.capacity and ssm.capacity):
            return 0.0
        null = -(-max(kv.page_bytes, ssm.page_bytes) // ssm.page_bytes) * ssm.page_bytes
        each = int(counts[0]) * kv.page_bytes - null
        return max(each * max(self.engines, 1) - kv.capacity_bytes - ssm.capacity_bytes, 0.0)

    def total(self, name: str, **labels: str) -> float:
        """A counter or gauge now."""
        return self.now.value(name, **labels)

    def grown(self, name: str, **labels: str) -> float:
        """What a counter gained in the window; after a restart of the server, since that."""
        now, before = self.now.value(name, **labels), self.before.value(name, **labels)
        return now - before if now >= before else now

    def rate(self, name: str, **labels: str) -> float | None:
        """What a counter gained a second; None of a window without length."""
        return self.grown(name, **labels) / self.seconds if self.seconds > 0 else None

    def ratio(self, part: str, whole: str) -> float | None:
        """What one counter gained to what another did; None where the other gained nothing."""
        grown = self.grown(whole)
        return self.grown(part) / grown if grown else None

    def mean(self, histogram: str) -> float | None:
        """Mean of a histogram's observations in the window; None where there were none."""
        return self.ratio(f"{histogram}_sum", f"{histogram}_count")
