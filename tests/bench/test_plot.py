"""``avmp plot``: each picture from a small result, the same bytes twice, one error for bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from avmp_vllm.bench import results
from avmp_vllm.bench.bands import Recorder
from avmp_vllm.bench.engine import command as engine
from avmp_vllm.bench.engine.workloads import workloads
from avmp_vllm.bench.predict.answers import load
from avmp_vllm.bench.predict.command import run_trace
from avmp_vllm.bench.prefix.command import SUMS
from avmp_vllm.bench.serve import command as serve
from avmp_vllm.bench.serve import report
from avmp_vllm.cli import main
from avmp_vllm.core import Arena, Geometry
from avmp_vllm.plots import bands, predict, ratios
from avmp_vllm.plots.command import PICTURES, draw

GEOMETRY = Geometry(arena_bytes=4096 * 16, page_bytes=16, block_bytes=88)


def _result(benchmark, counts, timings, **parameters):
    return {
        "format": results.FORMAT,
        "benchmark": benchmark,
        "environment": results.environment(1, ()),
        "parameters": parameters,
        "counts": counts,
        "timings": timings,
    }


def _bands():
    """A recording of an arena that really migrates."""
    arena = Arena(GEOMETRY, migration_batch=1)
    recorder = Recorder(arena)
    held = []
    for step in range(60):
        if step in (20, 40):
            arena.release(held[::2])
            arena.cache(held[1::2])
            held = []
        held += arena.allocate(pages=150) if step < 20 else arena.allocate(blocks=20)
        recorder.record(0, 0)
    assert sum(arena.statistics.migrations.values()) > 0
    counts = {
        "geometry": {
            "arena_bytes": GEOMETRY.arena_bytes,
            "page_bytes": GEOMETRY.page_bytes,
            "block_bytes": GEOMETRY.block_bytes,
            "page_tokens": 16,
            "null_bytes": GEOMETRY.null_blocks * GEOMETRY.block_bytes,
        },
        "phases": [
            {"name": "pages", "begin": 0, "requests": 20},
            {"name": "blocks", "begin": 20, "requests": 40},
        ],
        "columns": list(Recorder.COLUMNS),
        "steps": recorder.rows,
    }
    return _result("bands", counts, {})


def _serve():
    def side(value):
        figures = {row.key: value for row in report.ROWS}
        counts = {"answered": 1, "failed": 0, "prompt_tokens": 1, "answer_tokens": 1}
        return {"counts": counts, "figures": figures, "errors": [], "foreign_share": 0.0}

    rounds = {
        f"{workload}/{regime}": [{"avmp": side(v), "stock": side(2.0)} for v in (1.5, 1.0, 3.0)]
        for workload in (report.SINGLE, report.TURNS)
        for regime in (report.AMPLE, report.TIGHT)
    }
    return serve.result_of({"rounds": 3}, rounds, {key: [1.0, 1.0] for key in rounds})


def _paper():
    phases = dict.fromkeys(("service_ns", "retry_ns", "migration_ns", "idle_ns"), 5)
    replay, replay_times = {}, {}
    for batch in (1, 128):
        for workload in ("uniform_short", "mixed_long", "agentic_burst"):
            key = f"avmp_dynamic_b{batch}/{workload}/jamba_1_5_mini/1GiB/seed1"
            replay[key] = {"oom": batch, "rebalance_count": 3, "refused_migrations": 4}
            replay_times[key] = phases
    variants = {name: {"intact": n} for n, name in enumerate(("limit", "avmp", "stock_vllm"), 5)}
    life_phases = dict.fromkeys(("service_ns", "refused_ns", "migration_ns", "idle_ns"), 5)
    key = "corrected/mixed_long/jamba_1_5_mini/1GiB/seed1"
    return _result(
        "paper",
        {"replay": replay, "served": {key: {"demand": {}, "variants": variants}}},
        {"replay": replay_times, "served": {key: dict.fromkeys(variants, life_phases)}},
        lives=["served", "overload"],
    )


def _plan():
    fits = [
        {"stock": 30, "static": 19, "AVMP": 40, "limit": 41},
        {"stock": 3, "static": 2, "AVMP": 3, "limit": 3},
    ]
    counts = {"tokens": [64, 4096], "sequences": fits}
    counts |= {"page_tokens": 16, "stock_block_tokens": 528}
    return _result(
        "plan", counts, {}, model="a/b.json", arena_bytes=1 << 30, states=1, static_ratio=0.9
    )


def _scheduler():
    run = {
        "requests_per_second": 2.0,
        "concurrency_mean": 3.0,
        "makespan": 4.0,
        "preemptions": 0,
        "recomputed_tokens": 0,
        "hit_tokens": 5,
        "ttft": [1.0, 2.0, 3.0],
        "latency": [1.0, 2.0, 3.0],
    }
    counts = {name: [run, run] for name in ("stock", "static", "avmp")} | {"left_out": [0, 0]}
    timings = {name: [{"scheduler_us": 7.0}] * 2 for name in ("stock", "static", "avmp")}
    return _result("scheduler", counts, timings, model="m.json", trace="t.csv", seeds=2)


def _prefix():
    """Two sizes of memory, a cache that has a look and one that has none."""
    cell = dict.fromkeys(SUMS, 3) | {"hits": 2}
    caches = {name: [cell | {"hit": 30}, cell | {"hit": 45}] for name in ("avmp", "a new one")}
    counts = {"requests": 9, "prompt_tokens": 100, "caches": caches}
    counts |= {"offline": [50, 60], "bound": [55, 61]}
    parameters = {"model": "a/b.json", "trace": "agent", "memory": [1 << 29, 1 << 30]}
    titles = {"titles": {"avmp": "AVMP", "a new one": "another"}}
    return _result("prefix", counts, {}, **parameters) | titles


def _memory():
    """Two traces, more models than are drawn."""
    rules = ("live", "avmp", "avmp-held", "expandable", "kvcached")
    series = {rule: [(9 - i) << 20 for i in range(9)] for rule in rules}
    seconds = {"busy": 3.0, "ebb": 2.0, "quiet": 4.0, "end": 0.0}
    cell = {"seconds": seconds, "series": series | {"seconds": list(range(9))}}
    counts = {trace: dict.fromkeys("abcd", cell) for trace in ("one.csv", "two.json")}
    titles = {"titles": {rule: rule for rule in rules}}
    return _result("memory", counts, {}, busy=96, quiet=6) | titles


def _predict():
    """Two small loads, one of them a drift."""
    traces = ["lognormal[:60]", "lognormal[:40]+lognormal[:20]"]
    counts = {name: run_trace(load(name, 0), 16384, 0.03) for name in traces}
    return _result("predict", counts, {}, trace=traces)


def _engine():
    row = {"step_mean_ms": [1.0, 0.9, 1.1], "preemptions": [0.1, 0.0, 0.5]}
    parameters = {name: sizes[0] for name, sizes in engine.DEFAULTS.items()}
    parameters |= {"batches": [1, 16], "arena_mib": {"ample": 64, "tight": 4}, "rounds": 8}
    made = {
        one.name: {"ratios": dict.fromkeys(("avmp", "stock again"), row)}
        for one in workloads(parameters)
    }
    return _result("engine", {}, {"workloads": made}, **parameters)


MADE = {
    "engine": (_engine, {"engine"}),
    "bands": (_bands, {"bands"}),
    "serve": (_serve, {"serve"}),
    "paper": (_paper, {"paper-batches", "paper-phases", "paper-served"}),
    "plan": (_plan, {"capacity"}),
    "scheduler": (_scheduler, {"scheduler"}),
    "prefix": (_prefix, {"prefix"}),
    "memory": (_memory, {"memory"}),
    "predict": (_predict, {"predict"}),
}


def test_every_kind_is_tested():
    assert set(MADE) == set(PICTURES)


@pytest.mark.parametrize("name", MADE)
def test_pictures_are_written_and_reproducible(name, tmp_path):
    """PNG and SVG of every picture; a second run gives the same SVG, byte for byte."""
    make, expected = MADE[name]
    path = tmp_path / "result.json"
    results.write(path, make())
    written = {}
    for folder in ("one", "two"):
        assert main(["plot", str(path), "-o", str(tmp_path / folder)]) == 0
        written[folder] = {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()}
    assert set(written["one"]) == {f"{n}.{kind}" for n in expected for kind in ("png", "svg")}
    for file, content in written["one"].items():
        if file.endswith("svg"):
            assert content == written["two"][file]
            assert len(content) < 150_000
            assert b"<dc:date>" not in content
        else:
            assert content.startswith(b"\x89PNG")


def test_only_one_picture(tmp_path, capsys):
    path = tmp_path / "paper.json"
    results.write(path, _paper())
    assert main(["plot", str(path), "--only", "paper-phases"]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "paper.json",
        "paper-phases.png",
        "paper-phases.svg",
    }
    assert main(["plot", str(path), "--only", "other"]) == 2
    assert "paper-batches" in capsys.readouterr().err


def _without(key):
    broken = _serve()
    del broken["timings"]["single/ample"][key]
    return json.dumps(broken)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ('{"benchmark": "serve",\n oops', ":2: is not JSON"),
        (b"\xff\xfe", "cannot be read"),
        ("[1, 2]", "holds no result that can be drawn"),
        ('{"benchmark": "scan"}', "'scan'"),
        ('{"benchmark": "serve", "format": 99}', "format"),
        (_without("ratios"), "is no whole result of serve"),
    ],
    ids=["missing", "json", "bytes", "list", "unknown", "format", "garbled"],
)
def test_a_bad_file_is_one_error(content, words, tmp_path, capsys):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["plot", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("avmp plot: error: ")
    assert words in error
    assert error.count("\n") == 1
    assert str(path) in error
    assert not list(tmp_path.glob("*.svg"))


def test_bands_keep_every_change():
    """Points that are left out of the picture lie on the line between those that stay."""
    rng = np.random.default_rng(0)
    values = np.repeat(rng.integers(0, 3, 40), rng.integers(1, 5, 40))
    kept = bands.changes(values)
    assert kept[0] == 0
    assert kept[-1] == len(values) - 1
    steps = np.arange(len(values))
    rebuilt = values[kept][np.searchsorted(kept, steps, side="right") - 1]
    assert np.array_equal(rebuilt, values)
    assert len(kept) < len(values)


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        ("lognormal", "lognormal"),
        ("a/b/azure2023_conv.csv[:500]", "azure2023 500"),
        ("a/alpaca_lengths.csv@len_reference", "alpaca len_reference"),
        ("x/mooncake_c.jsonl[:9]+lognormal[:5]", "mooncake > lognormal"),
    ],
)
def test_names_of_traces_are_short(trace, expected):
    assert predict.short(trace) == expected


def test_a_ratio_favours_nobody_while_its_interval_spans_one():
    assert ratios.Ratio("a", 1.2, 0.9, 1.5, True).favours is None
    assert ratios.Ratio("a", 1.2, 1.1, 1.5, True).favours is True
    assert ratios.Ratio("a", 1.2, 1.1, 1.5, False).favours is False
    assert ratios.Ratio("a", 1.2, 1.1, 1.5, None).favours is None


def test_the_picture_shows_the_ratios_of_the_file(tmp_path):
    """What is drawn are the numbers of the file."""
    path = tmp_path / "serve.json"
    result = _serve()
    results.write(path, result)
    axes = draw(path)["serve"].axes
    labels = {text.get_text() for one in axes for text in one.texts}
    point = result["timings"]["single/ample"]["ratios"]["throughput"][0]
    assert f"{point:.2f}" in labels
