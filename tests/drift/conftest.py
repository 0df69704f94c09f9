"""The sources of the minor releases of vLLM that AVMP is written for."""

from __future__ import annotations

import functools

import pytest
import releases

from avmp_vllm.doctor.source import SourceTree
from avmp_vllm.version import SUPPORTED_VLLM


@functools.cache
def _tree(minor: str) -> SourceTree | str:
    try:
        return releases.tree(minor)
    except releases.Unavailable as error:
        return str(error)


@pytest.fixture(params=SUPPORTED_VLLM)
def minor(request) -> str:
    """A minor release."""
    return request.param


@pytest.fixture
def vllm(minor) -> SourceTree:
    """Its source."""
    found = _tree(minor)
    if isinstance(found, str):
        pytest.skip(f"not compared with vLLM {minor}: {found}")
    return found
