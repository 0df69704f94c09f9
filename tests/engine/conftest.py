"""Fixtures of the engine tests: tiny checkpoints, and one in-process engine at a time.

The environment is set before vLLM is imported: an engine core in this process starts in three
seconds instead of thirty.
"""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import pytest

from avmp_vllm.models import tiny_hybrids
from avmp_vllm.models.tiny_jamba import tiny_jamba_config, write_tiny_jamba


@pytest.fixture(scope="session")
def tiny_jamba(tmp_path_factory) -> str:
    """A Jamba of 8 layers: Mamba-1, attention and experts."""
    return str(write_tiny_jamba(tmp_path_factory.mktemp("jamba")))


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A Jamba's config.json, for schedulers without a model; no weights are needed."""
    folder = tmp_path_factory.mktemp("config")
    tiny_jamba_config(architectures=["JambaForCausalLM"]).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_granite(tmp_path_factory) -> str:
    """A Mamba-2 hybrid."""
    return str(tiny_hybrids.write_tiny_granite_hybrid(tmp_path_factory.mktemp("granite")))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> str:
    """Attention layers only."""
    return str(tiny_hybrids.write_tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def tiny_mamba(tmp_path_factory) -> str:
    """SSM layers only."""
    return str(tiny_hybrids.write_tiny_mamba(tmp_path_factory.mktemp("mamba")))


@pytest.fixture
def caplog_vllm(caplog):
    """Captured log of vLLM's loggers, which do not hand records to the root logger."""
    import logging

    logger = logging.getLogger("vllm")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    caplog.handler.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate
