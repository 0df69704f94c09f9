"""Sequences that fit against their length, from ``avmp plan --output``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from avmp_vllm.plots import style

GIB = 1 << 30
#: Variant -> colour, marker, line; the limit is what the others are compared with.
LOOKS = {
    "AVMP": (style.BLUE, "o", "-"),
    "stock": (style.ORANGE, "s", "-"),
    "static": (style.GREEN, "D", "--"),
}
TITLES = {"AVMP": "AVMP", "stock": "stock vLLM"}


def short(tokens: float) -> str:
    """1024 as 1k."""
    whole = int(tokens)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else str(whole)


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``capacity``: sequences, and their share of the limit."""
    parameters, counts = result["parameters"], result["counts"]
    lengths, fits = counts["tokens"], counts["sequences"]
    made, (absolute, share) = style.figure(1, 2, size=(10, 3.7))
    limit = [fit["limit"] for fit in fits]
    absolute.plot(lengths, limit, color=style.BLACK, linewidth=1, linestyle=":", label="limit")
    share.axhline(1, color=style.BLACK, linewidth=1, linestyle=":", label="limit")
    for name, (colour, marker, line) in LOOKS.items():
        values = [fit[name] for fit in fits]
        look = {"color": colour, "marker": marker, "linestyle": line, "markersize": 5}
        title = TITLES.get(name, f"static pools, state : KV = {parameters['static_ratio']:g}")
        absolute.plot(lengths, values, label=title, **look)
        reached = [
            value / most if most else float("nan")
            for value, most in zip(values, limit, strict=True)
        ]
        share.plot(lengths, reached, label=title, **look)
    for axes in (absolute, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [short(tokens) for tokens in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tokens of each sequence")
        style.light_grid(axes)
    absolute.set_yscale("log")
    absolute.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    absolute.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    absolute.yaxis.set_minor_locator(NullLocator())
    absolute.set_title("Sequences that fit")
    share.set_ylim(0, 1.06)
    share.yaxis.set_major_formatter(PercentFormatter(1.0))
    share.set_title("In % of the limit (bytes shared without any granularity)")
    share.legend(loc="lower left")
    states, model = parameters["states"], Path(parameters["model"]).name.removesuffix(".json")
    made.suptitle(
        f"{model}, {parameters['arena_bytes'] / GIB:.3g} GiB of cache, "
        f"{states} state{'s' if states > 1 else ''} a sequence; stock's block has "
        f"{counts['stock_block_tokens']:,} tokens, AVMP's page {counts['page_tokens']}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return {"capacity": made}
