"""Everything that touches vLLM: a floor for each process that it runs in, one file a seam.

========= ========================================== ==========================================
floor     what it is                                 runs in
========= ========================================== ==========================================
entry     plugin, seams, flag, options, refusals     every process of vLLM
layout    page sizes, groups and tensors, limits     engine core, and workers read its results
scheduler who gets which page, which states are kept engine core
worker    move plans and block tables, V1 and V2     workers
offload   pages and states on the host               engine core and workers, with that option
handles   AVMP's own kernels in a model              workers, with ``kernels: handles``
cpu       Mamba-1 layers without a GPU               CPU workers
========= ========================================== ==========================================

The scheduler's side and the workers' side know each other by ``layout`` alone, and by the move plan
that travels between them (``layout/message.py``).
"""
