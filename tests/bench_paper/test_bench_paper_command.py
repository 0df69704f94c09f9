"""The command line: result file, check, resuming, and errors that name file and line."""

from __future__ import annotations

import json

import pytest

from avmp_vllm.bench.paper import command
from avmp_vllm.bench.paper.workloads import read_sharegpt_counts
from avmp_vllm.cli import main


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch, tmp_path):
    """A grid of few cells, in a folder without published tables."""
    monkeypatch.chdir(tmp_path)
    sweep = command.Sweep(("fixed_dual_mr05", "avmp_dynamic_b128"), (1,), ("agentic_burst",))
    monkeypatch.setitem(command.SWEEPS, "throughput", sweep)
    monkeypatch.setattr(command, "SYNTHETIC", ("agentic_burst",))
    for name, value in (("COARSE", 4), ("FINE", 2), ("REPEATS", 1), ("ARENAS", (1,))):
        monkeypatch.setattr(command.honest, name, value)


SMALL = ["bench", "paper", "--sweep", "throughput"]


def test_writes_checks_and_notices_a_changed_count(tmp_path, capsys):
    path = tmp_path / "result.json"
    assert main([*SMALL, "--output", str(path)]) == 0
    assert "nothing was compared" in capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["benchmark"] == "paper"
    assert set(result["environment"]) == {"commit", "command", "seed", "versions", "machine"}
    assert len(result["counts"]["served"]) == 6
    assert not [name for name in json.dumps(result["counts"]).split('"') if name.endswith("_ns")]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result.json"]

    assert main(["bench", "paper", "--check", str(path)]) == 0
    assert "0 difference(s)" in capsys.readouterr().out
    key = "avmp_dynamic_b128/agentic_burst/jamba_1_5_mini/1GiB/seed3"
    result["counts"]["replay"][key]["oom_kv"] += 1
    path.write_text(json.dumps(result))
    assert main(["bench", "paper", "--check", str(path)]) == 1
    assert f"DIFFERS /replay/{key}/oom_kv: 41 in the file, 40 now" in capsys.readouterr().out


def test_interrupted_run_leaves_no_result_and_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    whole, done = command.Job._run_cell, []

    def stops(self, table, cell):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(cell)
        return whole(self, table, cell)

    monkeypatch.setattr(command.Job, "_run_cell", stops)
    assert main([*SMALL, "--part", "reproduce", "--output", str(path)]) == 130
    assert "7 cells are kept" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["result.json.journal"]
    again = []
    monkeypatch.setattr(
        command.Job, "_run_cell", lambda *a: again.append(a[-1]) or whole(*a), raising=True
    )
    assert main([*SMALL, "--part", "reproduce", "--output", str(path)]) == 0
    assert "behind 7 cells" in capsys.readouterr().err
    assert len(again) == 12 - 7
    assert not set(again) & set(done)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (None, "cannot be read"),
        ("index,tokens\n0,8\n", ":1: the header lacks the column(s) prompt_tokens"),
        ("index,prompt_tokens\n0,8\n1,-3\n", ":3: want '1,<prompt tokens>', found '1,-3'"),
        ("index,prompt_tokens\n0,8\n2,3\n", ":3: want '1,<prompt tokens>', found '2,3'"),
        ("index,prompt_tokens\n0\n", ":2: 1 fields where the header has 2"),
        ("index,prompt_tokens\n", ":1: holds no prompt lengths"),
    ],
)
def test_bad_sharegpt_file(tmp_path, capsys, text, where):
    path = tmp_path / "lengths.csv"
    if text is not None:
        path.write_text(text)
    assert main([*SMALL, "--sharegpt", str(path)]) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert where in error
    assert error.count("\n") == 1


def test_good_sharegpt_file(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("index,prompt_tokens\n0,8\n1,95\n")
    assert read_sharegpt_counts(path).tolist() == [8, 95]


def test_bad_published_tables(tmp_path, capsys):
    assert main([*SMALL, "--published", str(tmp_path / "nowhere")]) == 2
    assert "--published: there is no such folder" in capsys.readouterr().err
    assert main([*SMALL, "--part", "reproduce", "--published", str(tmp_path)]) == 2
    assert "paper_cells.csv: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("{", ":1: is not JSON"),
        ('{"benchmark": "scan"}', "is no result of `avmp bench paper`"),
        ('{"benchmark": "paper", "format": 9}', "has format 9, not 1"),
        ('{"benchmark": "paper", "format": 1}', "lacks counts, environment, parameters, timings"),
    ],
)
def test_bad_result_file(tmp_path, capsys, text, where):
    path = tmp_path / "old.json"
    path.write_text(text)
    assert main(["bench", "paper", "--check", str(path)]) == 2
    assert where in capsys.readouterr().err
