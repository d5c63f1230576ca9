"""The garbage collector rests while something is imported, and is then as it was."""

import gc

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
