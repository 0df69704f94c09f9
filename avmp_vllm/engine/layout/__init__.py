"""What both sides of the engine agree on before the first step.

======== ===========================================================================
pages    tokens of a KV page, and between two checkpoints of a state
groups   which pool a layer's cache belongs to
split    how wide a KV page is where several block tables share the pool
stages   which layers each pipeline stage has
arena    groups and tensors of an arena
elastic  how much memory an elastic arena may have
limits   what it must hold at least, and how many requests it holds at most
capacity what fits, printed at start-up
message  how a step's move plan travels
cold     where the values are in a block of states, for what encodes them
saves    what layers save inside of a step's chunks, from its plan to them
======== ===========================================================================
"""
