"""Result files, journals and intervals shared by all benchmarks."""

from __future__ import annotations

import json

import numpy as np
import pytest

from avmp_vllm.bench import results
from avmp_vllm.bench.statistics import mean_difference, ratio_of_means


def test_a_failing_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "result.json"
    results.write(path, {"counts": 1})
    with pytest.raises(TypeError):
        results.write(path, {"counts": object()})
    assert json.loads(path.read_text()) == {"counts": 1}


def test_journal_forgets_a_torn_line_and_other_parameters(tmp_path):
    path = tmp_path / "result.json"
    journal = results.Journal(path, {"seed": 1})
    journal.add("a", 1)
    journal.add("b", {"x": [2]})
    journal.close()
    with (tmp_path / "result.json.journal").open("a") as file:
        file.write('["c", 3')
    journal = results.Journal(path, {"seed": 1})
    assert journal.done == {"a": 1, "b": {"x": [2]}}
    journal.add("c", 4)
    journal.close()
    assert results.Journal(path, {"seed": 1}).done == {"a": 1, "b": {"x": [2]}, "c": 4}
    assert results.Journal(path, {"seed": 2}).done == {}


def test_differences_name_the_place():
    old = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert list(results.differences(old, old)) == []
    found = list(results.differences(old, {"a": {"x": 1, "y": [1, 3]}, "c": 1}))
    assert found == [
        "/a/y[1]: 2 in the file, 3 now",
        "/b: only in the file",
        "/c: only in the new run",
    ]


def test_environment_names_no_host(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/avmp", "bench", "paper"])
    found = results.environment(seed=3)
    assert found["command"] == "avmp bench paper"
    assert found["seed"] == 3
    assert {"python", "numpy", "avmp-vllm"} <= found["versions"].keys()


def test_interval_of_a_ratio_covers_it():
    """Of 200 draws of 40 pairs, about 95% of the intervals hold the true ratio 2."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        below = rng.normal(10, 2, 40)
        above = 2 * below + rng.normal(0, 1, 40)
        interval = ratio_of_means(above, below, rng, resamples=400)
        held += interval.low <= 2 <= interval.high
    assert 175 <= held <= 199


def test_no_difference_has_no_width():
    interval = mean_difference([1, 2, 3], [1, 2, 3], np.random.default_rng(1))
    assert interval == (0, 0, 0)
    with pytest.raises(ValueError, match="pairs are needed"):
        ratio_of_means([1, 2], [1], np.random.default_rng(1))
