"""Watch the arena of a running server: one line a second, from its /metrics.

python examples/watch_arena.py [URL]        # default http://127.0.0.1:8000; Ctrl-C ends it
"""

from __future__ import annotations

import contextlib
import sys
import time
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def read(url: str) -> dict[str, float]:
    """AVMP's samples as ``name{label}`` -> value, summed over engines."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        text = response.read().decode()
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            label = sample.labels.get("pool") or sample.labels.get("direction")
            if label and sample.name.startswith("vllm:avmp_"):
                key = f"{sample.name.removeprefix('vllm:avmp_')}{{{label}}}"
                values[key] = values.get(key, 0) + sample.value
    return values


def main() -> None:
    url = (sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000").rstrip("/")
    print("pool: pages used + cached / capacity               migrations        relocated")
    while True:
        now = read(url)
        if not now:
            sys.exit(f"{url} exports no vllm:avmp_ metrics: start it with --block-manager avmp")
        pools = "   ".join(
            f"{pool}: {now[f'pages_used{{{pool}}}']:5.0f} + {now[f'pages_cached{{{pool}}}']:5.0f}"
            f" / {now[f'capacity_pages{{{pool}}}']:5.0f}"
            for pool in ("kv", "ssm")
        )
        moved = sum(now[f"relocated_bytes_total{{{pool}}}"] for pool in ("kv", "ssm"))
        print(
            f"{pools}   to ssm {now['migrations_total{kv_to_ssm}']:.0f}, "
            f"to kv {now['migrations_total{ssm_to_kv}']:.0f}   {moved / 2**20:.1f} MiB",
            flush=True,
        )
        time.sleep(1)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
