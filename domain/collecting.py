"""Python's garbage collector, at rest while modules are imported."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within, nothing is searched for garbage: what an import makes stays, and searching it takes up to a third longer.

    It is for imports only: garbage of other threads stays, too, until the first search afterwards.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
