"""AVMP on the minor release that has no build for this machine, as far as its Python goes.

The tests of the manager and the fuzz, unchanged, over that release's own scheduler, cache managers
and prefix cache. Two models run as well, on its engine core and its Model Runner V1, but what
computes there is compiled, and of the release that is installed.
"""

from __future__ import annotations

import re

import overlay
import pytest
import releases

from avmp_vllm.version import SUPPORTED_VLLM

OTHERS = [minor for minor in SUPPORTED_VLLM if minor != releases.installed_minor()]
_IS_THERE = """
import vllm
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.worker.cpu_worker import CPUWorker
print("imports", vllm.__file__)
"""
_IS_USED = """
from avmp_vllm.engine.entry import minors, seams
from avmp_vllm.engine.scheduler.scheduler import AVMPAsyncScheduler
from avmp_vllm.engine.worker.cpu import AVMPCPUWorker
seams.install((*seams.SELECTION, *seams.ENGINE))
print("uses", minors.minor())
"""


@pytest.fixture(scope="module", params=OTHERS)
def other(request, tmp_path_factory):
    """The other minor, and its overlay."""
    minor = request.param
    try:
        tree = releases.tree(minor)
    except releases.Unavailable as error:
        pytest.skip(f"vLLM {minor} was not run: {error}")
    folder = tmp_path_factory.mktemp("overlay")
    overlay.build(folder, tree, releases.RELEASES[minor])
    done = overlay.run(folder, "-c", _IS_THERE, timeout=500)
    if f"imports {folder}" not in done.stdout:
        last = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        pytest.skip(f"vLLM {minor} was not run: it does not import over the installed one: {last}")
    return minor, folder


def test_the_engine_imports_and_the_seams_install(other):
    """All of AVMP that is imported on a CPU."""
    minor, folder = other
    done = overlay.run(folder, "-c", _IS_USED, timeout=500)
    assert f"uses {minor}" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("least", "arguments"),
    [
        # Without those that take longest and go through the same code as others.
        (15, ["tests/engine/test_manager.py", "-k", "not smallest and not two_requests"]),
        (2, ["tests/engine/test_equality.py", "-k", "mamba2_hybrid or tight-cache"]),
        (6, ["tests/fuzz/test_fuzz.py", "--streams", "16", "-k", "not retention or None"]),
    ],
    ids=["manager", "models", "fuzz"],
)
def test_its_tests_pass(other, least, arguments):
    """With every invariant checked at every step."""
    _, folder = other
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = overlay.run(folder, "-m", "pytest", *options, *arguments, timeout=560)
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
