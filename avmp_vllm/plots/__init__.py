"""Pictures of result files; ``avmp plot``. One kind of picture a file.

======== ===================================================================
style    colours, hatches, reproducible SVG, saving
bands    the arena over time, from ``avmp bench bands``
ratios   AVMP / stock with intervals, from ``avmp bench serve``
memory   bytes backed over time, from ``avmp bench memory``
paper    batch sizes, phase times, completions, from ``avmp bench paper``
prefix   hit rate over memory, from ``avmp bench prefix``
predict  log-loss, fit and fill, from ``avmp bench predict``
capacity sequences that fit against their length, from ``avmp plan``
command  which picture belongs to which result
======== ===================================================================
"""
