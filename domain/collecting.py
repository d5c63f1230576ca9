"""Python's garbage collector, at rest while modules are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected(*, for_good: bool = False) -> Iterator[None]:
    """Within, nothing is searched for garbage: what an import makes stays, and searching it takes up to a third longer.

    A thread that is within keeps the others' garbage, too.

    - for_good: whatever is there afterwards is left out of every later search. Only for a process of ours alone: of
      what another program holds by then, a model say, nothing would be found when it is dropped.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            if for_good:
                gc.freeze()
            gc.enable()
