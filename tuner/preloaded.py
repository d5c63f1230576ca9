"""What the process that workers are forked from imports. Every worker waits for it, so there is nothing else in it."""

import atexit
import gc
import os

from tilewise.domain.collecting import uncollected

with uncollected():
    from . import compiling, measuring  # noqa: F401

gc.freeze()  # nor do workers search it, and so write to pages that they share

# It holds stdout open, and whoever reads that to its end would wait until torch is taken down; it has nothing to end.
atexit.register(os._exit, 0)
