"""Asymmetric Virtual Memory Paging: a block manager for hybrid models on vLLM."""

from avmp_vllm.version import __version__

__all__ = ["__version__"]
