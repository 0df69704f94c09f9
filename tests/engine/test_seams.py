"""The places where vLLM is changed: as expected, and only where AVMP is in charge."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from avmp_vllm.engine.entry import minors, seams
from avmp_vllm.engine.entry.config import SELECTED, ConfigError
from avmp_vllm.engine.entry.selection import (
    ASYNC_SCHEDULER,
    SCHEDULER,
    WORKERS,
    require_supported_vllm,
)

#: Every seam that the installed vLLM has.
EVERY = seams.of(
    (*seams.SELECTION, *seams.ENGINE, *seams.API, *seams.RUNNER_V1, *seams.RUNNER_V2),
    minors.minor(),
)


@pytest.mark.parametrize("seam", EVERY, ids=lambda seam: seam.path)
def test_seam_stands_where_it_says(seam):
    """In the vLLM that is installed. ``tests/drift`` has the signatures, and the other minors."""
    assert callable(seams.stock(seam))
    assert seam.why
    assert seam.until


def test_only_the_seams_of_a_minor_are_installed(monkeypatch):
    """A place that the installed vLLM does not have is left alone."""
    gone = seams.Seam("vllm", "no_such_place", "nobody:nothing", (), "", "", minors=("0.33",))
    monkeypatch.setattr(minors, "minor", lambda: "0.32")
    seams.install([gone])
    monkeypatch.setattr(minors, "minor", lambda: "0.33")
    with pytest.raises(AttributeError, match="no_such_place"):
        seams.install([gone])


@pytest.mark.parametrize("name", [*WORKERS.values(), SCHEDULER, ASYNC_SCHEDULER])
def test_classes_named_in_the_configuration_exist(name):
    """vLLM imports them by name in other processes."""
    module, cls = name.rsplit(".", 1)
    if module.endswith("gpu_worker"):
        pytest.importorskip("vllm.v1.worker.gpu_worker")
    assert inspect.isclass(getattr(__import__(module, fromlist=["_"]), cls))


_UNTOUCHED = """
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=128,
          kv_cache_memory_bytes=8 << 20, additional_config={"block_manager": "default"})
llm.generate([{"prompt_token_ids": [20, 21, 22]}], SamplingParams(max_tokens=2), use_tqdm=False)
from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.entry import minors
assert all(seams.is_installed(seam) for seam in seams.SELECTION)
assert not any(seams.is_installed(seam) for seam in seams.of(seams.ENGINE, minors.minor()))
core = llm.llm_engine.engine_core.engine_core
assert type(core.scheduler.kv_cache_manager) is KVCacheManager
assert type(core.scheduler).__module__.startswith("vllm.")
worker = llm.llm_engine.model_executor.driver_worker.worker
assert type(worker).__module__.startswith("vllm.")
assert type(worker.model_runner).__module__.startswith("vllm.")
loaded = [name for name in sys.modules if name.startswith("avmp_vllm.core")]
assert not loaded, loaded
print("untouched")
"""


def test_default_leaves_vllm_untouched(tiny_jamba):
    """Without ``avmp`` nothing but the flag and the look at the configuration is there."""
    environment = {name: value for name, value in os.environ.items() if name != SELECTED}
    done = subprocess.run(
        [sys.executable, "-c", _UNTOUCHED, tiny_jamba],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip().endswith("untouched"), done.stdout + done.stderr


@pytest.mark.parametrize("found", ["0.31.4", "0.34.0", "1.0.0+cpu"])
def test_another_vllm_is_refused(found):
    """Both versions are named."""
    with pytest.raises(ConfigError, match=rf"vLLM 0.32.x or 0.33.x,.*{found.split('+')[0]}"):
        require_supported_vllm(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.3+cpu", "0.33.0", "0.33.1"])
def test_the_supported_vllm_is_not(found):
    """Patch releases and builds do not matter."""
    require_supported_vllm(found)
