"""The scheduler's side, in the engine core: vLLM's classes over one arena.

============= ======================================================================
scheduler     the schedulers, which send each step's move plan
sessions      streaming sessions, which may have to start over
manager       ``AVMPBlockSpaceManager``, vLLM's ``KVCacheManager``
admission     how much room a newcomer leaves to those that run
victims       whom vLLM preempts
inside_pages  decode steps in which a request needs nothing
coordinator   vLLM's ``KVCacheCoordinator`` over both pools
block_pool    vLLM's ``BlockPool`` over one pool of the arena
state_pool    the pool of states, each published at its own position only
state_manager vLLM's ``MambaManager``, which says where each state stands
memory        how much memory an elastic arena has
commands      what a user may ask of a running engine about it
checkpoints   which states a running engine makes and keeps
visits        what is known of a request on its way
cold_states   kept states that are encoded before they would go
integrity     whether vLLM's blocks agree with the arena
metrics       AVMP's counters
stat_logger   these in Prometheus and in the log line
============= ======================================================================
"""
