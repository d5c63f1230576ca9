"""The garbage collector rests while something is imported, and is then as it was."""

import gc
import weakref

import pytest

from tilewise.domain.collecting import uncollected


@uncollected()
def fails() -> None:
    assert not gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert not gc.isenabled()
    raise ImportError


def test_the_collector_rests_within_and_is_then_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError):
        fails()
    assert gc.isenabled()


class _Held:
    """Something in a cycle, as a model with a hook of its own is."""

    def __init__(self) -> None:
        self.itself = self


def test_what_a_program_held_before_is_collected_when_it_is_dropped() -> None:
    held = _Held()
    there = weakref.ref(held)
    with uncollected():
        pass
    del held
    gc.collect()
    assert there() is None
