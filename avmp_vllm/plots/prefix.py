"""Hit rate over memory, from ``avmp bench prefix``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from avmp_vllm.plots import style

GIB = 1 << 30
#: Cache -> colour, marker, line. Settings of one system share a colour.
LOOKS = {
    "avmp": (style.BLUE, "o", "-"),
    "avmp-lru": (style.SKY, "o", "--"),
    "stock": (style.ORANGE, "s", "-"),
    "stock-dense": (style.ORANGE, "D", "--"),
    "stock-interval": (style.ORANGE, "v", ":"),
    "stock-unit": (style.VERMILION, "s", "--"),
    "stock-unit-dense": (style.VERMILION, "D", ":"),
    "sglang": (style.GREEN, "P", "-"),
    "sglang-static": (style.GREEN, "X", "--"),
    "marconi": (style.PURPLE, "^", "-"),
    "marconi-lru": (style.PURPLE, "v", "--"),
}
#: For caches that have no look of their own.
OTHER = (style.GREY, "*", "-")


def draw(result: Mapping[str, Any]) -> dict[str, Figure]:
    """``prefix``: each cache's hit tokens by memory, between nothing and the bound."""
    parameters, counts = result["parameters"], result["counts"]
    memory = [size / GIB for size in parameters["memory"]]
    prompt = counts["prompt_tokens"]
    made, (axes,) = style.figure(size=(8.6, 4.4))
    bound = [tokens / prompt for tokens in counts["bound"]]
    axes.fill_between(memory, bound, 1, color=style.PALE, linewidth=0)
    axes.plot(memory, bound, color=style.BLACK, linewidth=1.2, label="no cache can hit more")
    offline = [tokens / prompt for tokens in counts["offline"]]
    axes.plot(
        memory, offline, color=style.BLACK, linewidth=1, linestyle=":", label="the future known"
    )
    for name, row in counts["caches"].items():
        colour, marker, line = LOOKS.get(name, OTHER)
        axes.plot(
            memory,
            [cell["hit"] / prompt for cell in row],
            color=colour,
            marker=marker,
            linestyle=line,
            markersize=5,
            linewidth=2.2 if name == "avmp" else 1.3,
            label=result["titles"].get(name, name),
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(memory, [f"{gib:g}" for gib in memory])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("GiB of cache")
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("Prompt tokens that were hit")
    style.light_grid(axes)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    model, trace = (Path(parameters[key]).name for key in ("model", "trace"))
    made.suptitle(
        f"{model.removesuffix('.json')}, {trace}: {counts['requests']:,} requests, "
        f"{prompt:,} prompt tokens",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return {"prefix": made}
