"""Sizes that ``hybrid_specs`` and its tests share: of the arena, and of vLLM's configuration."""

ARENA = 64 << 20
PAGE, SPACING, LONGEST, STEP = 32, 1024, 4096, 512
