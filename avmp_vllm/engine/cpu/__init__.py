"""Mamba-1 layers on the CPU, where vLLM has no kernels of its own.

===== ==============================================================================
mamba the layers
scan  their compiled kernels
===== ==============================================================================
"""
