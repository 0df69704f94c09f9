"""The Dockerfile: linted, and on the vLLM that the plugin is written for. Nothing is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from avmp_vllm.version import SUPPORTED_VLLM

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    """Lint a Dockerfile; skip where there is no program for this machine."""
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
        "hadolint"
    )
    if program is None:
        pytest.skip("hadolint is not installed; it comes with the test extra on Linux, x86_64")
    return subprocess.run([program, str(path)], capture_output=True, text=True, check=False)


def test_lint():
    """No finding of any severity."""
    done = hadolint(DOCKERFILE)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "replacement", "rule"),
    [
        ("FROM vllm/vllm-openai:v0.32.0", "FROM vllm/vllm-openai", "DL3006"),
        ("WORKDIR /home/avmp", "WORKDIR home", "DL3000"),
        ("USER 10001:0", "USER root", "DL3002"),
    ],
)
def test_control_lint_sees_mistakes(tmp_path, line, replacement, rule):
    """A base without a tag, a relative folder, a last user who is root."""
    text = DOCKERFILE.read_text()
    assert line in text
    broken = tmp_path / "Dockerfile"
    broken.write_text(text.replace(line, replacement))
    done = hadolint(broken)
    assert done.returncode != 0
    assert rule in done.stdout


def test_the_base_is_the_supported_vllm():
    """A full version, not `latest`, of the minor release that the tests run."""
    (tag,) = re.findall(r"^FROM vllm/vllm-openai:v(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(SUPPORTED_VLLM[0])}\.\d+", tag)


def test_it_serves_as_a_user_without_privileges():
    """The last words of the file that matter."""
    lines = DOCKERFILE.read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:0"]
    assert lines[-1] == 'ENTRYPOINT ["vllm", "serve"]'
