"""Imports point one way: core, then kernels and backing, then the engine, then the tools."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = {"bench", "demo", "doctor", "models", "planner", "plots", "top"}
#: Of each floor: its folder, and what it may import beside the standard library and itself.
FLOORS = {
    "core": ("avmp_vllm/core", set()),
    "predict": ("avmp_vllm/predict", {"numpy"}),
    "kernels": ("kernels", {"avmp_kernels", "torch", "triton"}),
    "backing": ("avmp_vllm/backing", {"avmp_vllm.core", "avmp_kernels", "cuda", "numpy", "torch"}),
}
#: Of each floor of the engine: the others that it may import. ``entry`` reaches them by name.
ENGINE = {
    "entry": {"cpu", "handles"},
    "layout": {"entry"},
    "scheduler": {"entry", "layout"},
    "worker": {"entry", "layout", "handles"},
    "offload": {"entry", "layout"},
    "handles": {"entry", "layout"},
    "cpu": {"entry", "layout"},
}


def imported(source: str) -> Iterator[str]:
    """Modules that a file imports, anywhere in it; of our own packages with their first folder."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            names = [node.module or ""]
            if node.module == "avmp_vllm":
                names = [f"avmp_vllm.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield ".".join(parts[:2]) if parts[0] == "avmp_vllm" else parts[0]


def engine_floors(source: str) -> set[str]:
    """Floors of the engine that a file imports, anywhere in it."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return {name.split(".")[2] for name in modules if name.startswith("avmp_vllm.engine.")}


def of(folder: str) -> dict[str, set[str]]:
    """What each file of a folder imports, the standard library left out."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return {
        str(path.relative_to(ROOT)): set(imported(path.read_text())) - sys.stdlib_module_names
        for path in files
    }


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_stands_on_those_below(floor):
    folder, allowed = FLOORS[floor]
    own = folder.replace("/", ".")
    for file, names in of(folder).items():
        assert names <= {*allowed, own}, file


def test_the_engine_imports_no_tool():
    """vLLM's processes load the plugin; no benchmark comes with it."""
    for file, names in of("avmp_vllm/engine").items():
        assert not names & {f"avmp_vllm.{tool}" for tool in TOOLS}, file


@pytest.mark.parametrize("floor", ENGINE)
def test_the_engines_floors_know_each_other_by_the_layout(floor):
    """Scheduler and workers are different processes: neither imports the other."""
    for path in sorted((ROOT / "avmp_vllm/engine" / floor).rglob("*.py")):
        assert engine_floors(path.read_text()) <= {floor, *ENGINE[floor]}, path


def test_every_floor_of_the_engine_is_known_here():
    folders = {path.parent.name for path in (ROOT / "avmp_vllm/engine").glob("*/__init__.py")}
    assert folders == set(ENGINE)
    files = {path.name for path in (ROOT / "avmp_vllm/engine").glob("*.py")}
    assert files == {"__init__.py"}, "a file belongs to a floor"


LISTED = ["core", "backing", "predict", *(f"engine/{floor}" for floor in ENGINE)]


@pytest.mark.parametrize("folder", LISTED)
def test_a_folder_lists_its_files(folder):
    """The table at the head of a folder names each of its files, by a word of its left column."""
    path = ROOT / "avmp_vllm" / folder
    head = ast.get_docstring(ast.parse((path / "__init__.py").read_text())) or ""
    table = head.split("\n=")[1:-1]
    rows = [row for part in table for row in part.splitlines()[1:] if not row.startswith(" ")]
    listed = {word.strip(",") for row in rows for word in row.split("  ")[0].split()}
    files = {file.stem for file in path.glob("*.py")} - {"__init__"}
    assert files <= listed, f"not in the table: {sorted(files - listed)}"


def test_no_file_of_the_engine_is_long():
    for path in (ROOT / "avmp_vllm/engine").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_folder_is_known_here():
    """A new one is put on a floor, or among the tools."""
    folders = {path.parent.name for path in (ROOT / "avmp_vllm").glob("*/__init__.py")}
    assert folders <= {*FLOORS, "engine", *TOOLS}


def test_control_what_the_walk_sees():
    """Imports inside functions and under TYPE_CHECKING count."""
    source = "import os, vllm.config\ndef f():\n    from avmp_vllm.engine import seams\n"
    assert set(imported(source)) == {"os", "vllm", "avmp_vllm.engine"}
    assert set(imported("from avmp_vllm import core")) == {"avmp_vllm.core"}
    source = "def f():\n    from avmp_vllm.engine.worker.plans import PlanApplier\n"
    assert engine_floors(source) == {"worker"}
    assert engine_floors("from avmp_vllm.engine import worker") == {"worker"}
