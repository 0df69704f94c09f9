"""What every kernel must compute, in clear torch code that runs anywhere.

Loops are fine here: these functions are read and compared with, never served from.
"""
