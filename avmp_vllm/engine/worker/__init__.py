"""The workers' side: move plans are applied, handles become physical indices.

================ ===================================================================
cpu, gpu         vLLM's workers, with AVMP's runners
plans            a worker's copy of the arena, kept in step by move plans
memory           what the engine core asks about the arena's memory
elastic          a range of which two ends have memory, in the place of vLLM's allocation
profiling        the throwaway cache on which CUDA graphs are profiled
v1, v2           Model Runner V1 and V2
================ ===================================================================
"""
