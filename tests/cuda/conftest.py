"""Tests that need a card: whole engines on CUDA, over the arena's real memory there.

They run where torch sees a CUDA device, with vLLM's CUDA build: ``pytest tests/cuda``. Elsewhere
each is skipped by name. The runner is vLLM's default there, V2; with ``VLLM_USE_V2_MODEL_RUNNER=0``
in the environment the same tests run on V1.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Engines in this process, and the helpers that the tests on CPUs use too.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# vLLM's Triton kernels multiply fp32 in TF32 unless told otherwise, whose ten bits of mantissa let
# another batch change the best token.
os.environ["TRITON_F32_DEFAULT"] = "ieee"
sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import pytest
import torch

from avmp_vllm.models import tiny_hybrids
from avmp_vllm.models.tiny_jamba import write_tiny_jamba


@pytest.fixture(autouse=True)
def card() -> None:
    """A CUDA device, or the test does not run."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: engines are not run on a card")


@pytest.fixture(scope="session")
def tiny_jamba(tmp_path_factory) -> str:
    """A Jamba of 8 layers: Mamba-1, attention and experts."""
    return str(write_tiny_jamba(tmp_path_factory.mktemp("jamba")))


@pytest.fixture(scope="session")
def jamba_of_large_states(tmp_path_factory) -> str:
    """One whose states have 1.5 MiB, so that chunks of a device's memory follow the load."""
    return str(write_tiny_jamba(tmp_path_factory.mktemp("large"), mamba_d_state=256))


@pytest.fixture(scope="session")
def tiny_granite(tmp_path_factory) -> str:
    """A Mamba-2 hybrid."""
    return str(tiny_hybrids.write_tiny_granite_hybrid(tmp_path_factory.mktemp("granite")))
