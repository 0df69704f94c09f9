"""A release of vLLM that has no build for this machine, run as far as it goes.

Its Python files over the compiled files of the vLLM that is installed. The scheduler, the cache
managers and everything else of the engine core is Python and runs as released; what computes is the
other release's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from avmp_vllm.doctor.source import SourceTree

ROOT = Path(__file__).parents[2]


def build(folder: Path, tree: SourceTree, release: str) -> Path:
    """Lay a release over the installed one.

    Args:
        folder: Empty.
        tree: The release's source.
        release: Its version.

    Returns:
        What to put on ``PYTHONPATH``.
    """
    for base, kept in ((tree.root, {".py"}), (SourceTree.installed().root, None)):
        for path in (base / "vllm").rglob("*"):
            wanted = path.suffix in kept if kept else path.suffix not in (".py", ".pyc")
            if wanted and path.is_file():
                link = folder / path.relative_to(base)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)
    # By the version, vLLM tells that it is on a CPU, and AVMP which minor this is.
    metadata = folder / f"vllm-{release}+cpu.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}+cpu\n"
    )
    return folder


def run(overlay: Path, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run Python with the overlay in the place of the installed vLLM."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(overlay), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
