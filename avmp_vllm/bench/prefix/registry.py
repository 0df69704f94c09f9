"""The caches that are compared, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from avmp_vllm.bench.prefix import avmp, radix_rules, vllm_rules
from avmp_vllm.bench.prefix.cache import Cache, Sizes


class Rival(NamedTuple):
    """One row of the table.

    Attributes:
        make: From bytes and sizes.
        title: What it is.
        stock: A setting of stock vLLM; the best of these is the baseline.
    """

    make: Callable[[int, Sizes], Cache]
    title: str
    stock: bool = False


CACHES: dict[str, Rival] = {
    "stock": Rival(vllm_rules.Stock, "vLLM 0.32, default", True),
    "stock-dense": Rival(vllm_rules.StockDense, "vLLM, every state kept", True),
    "stock-interval": Rival(
        vllm_rules.StockInterval, f"vLLM, interval of {vllm_rules.INTERVAL_BLOCKS} blocks", True
    ),
    "stock-unit": Rival(vllm_rules.StockUnit, "vLLM, --prefix-match-unit 16", True),
    "stock-unit-dense": Rival(vllm_rules.StockUnitDense, "the same, every state kept", True),
    "sglang-static": Rival(radix_rules.SglangStatic, "SGLang, default split"),
    "sglang": Rival(radix_rules.Sglang, "SGLang, unified memory"),
    "marconi-lru": Rival(radix_rules.MarconiLru, "Marconi, least recent use"),
    "marconi": Rival(radix_rules.Marconi, "Marconi, its own eviction"),
    "avmp": Rival(avmp.Avmp, "AVMP"),
    "avmp-inside": Rival(avmp.AvmpInside, "AVMP, a prompt's last state costs no cut"),
    "avmp-cold": Rival(avmp.AvmpCold, "the same, cold states in half their bytes"),
    "avmp-lru": Rival(vllm_rules.FirstAvmp, "AVMP before it chose its states"),
}
