"""The documentation site builds, and every link in it leads somewhere."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx", reason="the docs extra is not installed")
pytest.importorskip("myst_parser", reason="the docs extra is not installed")

ROOT = Path(__file__).parents[2]


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Build the site as ``make docs`` does: a warning, which a broken link is, ends the build."""
    command = [sys.executable, "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-c", "docs"]
    return subprocess.run(
        [*command, ".", str(target)], cwd=source, capture_output=True, text=True, check=False
    )


def test_the_site_builds(tmp_path):
    """Without a warning, with all pages and pictures."""
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("index", "architecture", "operators", "support"):
        assert (tmp_path / "docs" / f"{name}.html").is_file(), name
    for name in ("README", "CONTRIBUTING", "CHANGELOG", "kernels/README", "avmp_vllm/bench/README"):
        assert (tmp_path / f"{name}.html").is_file(), name
    assert (tmp_path / "_images" / "arena.svg").is_file()


@pytest.mark.parametrize(
    ("link", "broken"),
    [
        ("[a file](../there.txt)", False),
        ("[a page](../README.md#a-heading)", False),
        ("[a file](../nowhere.txt)", True),
        ("[a page](nowhere.md)", True),
        ("[a heading](../README.md#nowhere)", True),
        ("![a picture](nowhere.svg)", True),
    ],
)
def test_control_a_link_that_leads_nowhere_ends_the_build(tmp_path, link, broken):
    """The build above would notice."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", tmp_path / "docs")
    (tmp_path / "there.txt").touch()
    (tmp_path / "README.md").write_text("---\norphan: true\n---\n# Title\n\n## A heading\n")
    (tmp_path / "docs" / "index.md").write_text(f"# Index\n\n{link}\n")
    done = build(tmp_path, tmp_path / "out")
    assert (done.returncode != 0) is broken, done.stderr


def test_the_arena_s_arrows_stay_inside_of_the_picture():
    """They reached beyond its upper edge once."""
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_arena", ROOT / "docs" / "draw_arena.py")
    draw_arena = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_arena)
    from matplotlib.patches import FancyArrowPatch

    figure = draw_arena.picture()
    figure.canvas.draw()
    arrows = [
        (axes, patch)
        for axes in figure.axes
        for patch in axes.patches
        if isinstance(patch, FancyArrowPatch)
    ]
    assert len(arrows) > 1
    for axes, arrow in arrows:
        outline = arrow.get_path().get_extents(arrow.get_transform() - axes.transData)
        low, high = axes.get_ylim()
        assert low < outline.ymin
        assert outline.ymax < high
