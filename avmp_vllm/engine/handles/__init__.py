"""``kernels: handles``: AVMP's own kernels in a model.

========= ==========================================================================
selection when they are used, and their installation in a loaded model
attention attention by handle, a backend of vLLM's registry
mamba     a Mamba-1 layer by handle
========= ==========================================================================
"""
