"""The places where vLLM is changed: as expected, and only where AVMP is in charge."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

from avmp_vllm.doctor.drift import OVERRIDDEN, all_seams, drift, find
from avmp_vllm.engine.entry import seams
from avmp_vllm.engine.entry.config import SELECTED, ConfigError
from avmp_vllm.engine.entry.selection import (
    ASYNC_SCHEDULER,
    SCHEDULER,
    WORKERS,
    require_supported_vllm,
)


@pytest.mark.parametrize("seam", all_seams(), ids=lambda seam: seam.path)
def test_seam_has_the_signature_its_wrapper_relies_on(seam):
    """An upgrade of vLLM fails here, in words, before it fails in a stack trace."""
    assert not drift(seams.stock(seam), seam.signature)
    assert seam.why
    assert seam.until


@pytest.mark.parametrize("where", OVERRIDDEN)
def test_overridden_methods_have_not_drifted(where):
    """The same for what AVMP's subclasses override."""
    assert not drift(find(where), OVERRIDDEN[where])


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
assert all(seams.is_installed(seam) for seam in seams.SELECTION)
assert not any(seams.is_installed(seam) for seam in seams.ENGINE)
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


@pytest.mark.parametrize("found", ["0.31.4", "0.33.0", "1.0.0+cpu"])
def test_another_vllm_is_refused(found):
    """Both versions are named."""
    with pytest.raises(ConfigError, match=rf"vLLM 0.32.x.*{found.split('+')[0]}"):
        require_supported_vllm(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.3+cpu"])
def test_the_supported_vllm_is_not(found):
    """Patch releases and builds do not matter."""
    require_supported_vllm(found)
