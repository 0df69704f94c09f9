"""Everything that touches vLLM, one file a seam.

================= ======================================================================
plugin            entry point: what is registered when vLLM loads its plugins
seams             the table of every place where vLLM is changed, and its installation
flag              ``--block-manager`` on the command line
config            the options under ``additional_config["avmp"]``
last_line         a refusal is the last line that the user of a command line reads
options           vLLM options that AVMP refuses
layout            page sizes, cache groups and tensors of an arena
capacity          what fits, printed at start-up
block_pool        vLLM's ``BlockPool`` over one pool of the arena
checkpoints       which states a running engine makes and keeps
state_pool        the pool of states, each published at its own position only
state_manager     vLLM's ``MambaManager``, which says where each state stands
coordinator       vLLM's ``KVCacheCoordinator`` over both
manager           ``AVMPBlockSpaceManager``, vLLM's ``KVCacheManager``
scheduler         the schedulers, which send each step's move plan
sessions          streaming sessions, which may have to start over
block_tables      handles to physical indices in Model Runner V1
worker            the CPU worker and Model Runner V1
gpu_worker        the CUDA worker
plans             a worker's copy of the arena, kept in step by move plans
profiling         the throwaway cache on which CUDA graphs are profiled
v2_runner         Model Runner V2
v2_block_tables   its block tables: handles resolved once a step, or left
v2_check          debug mode: its handles checked on the device
handle_kernels    ``kernels: handles``: AVMP's own kernels in a model
handle_attention  attention by handle, a backend of vLLM's registry
handle_mamba      a Mamba-1 layer by handle
metrics           Prometheus metrics and the log line
cpu_mamba         Mamba-1 layers on the CPU
cpu_scan          their compiled kernels
================= ======================================================================
"""
