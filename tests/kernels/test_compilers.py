"""Processes that measure have one cache of Triton, whoever compiled first in them."""

import os

import pytest
from triton import knobs

from tilewise.kernels.compilers import share_caches


def test_triton_keeps_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    own = knobs.cache.dir
    share_caches()
    assert os.environ["TRITON_CACHE_DIR"] == knobs.cache.dir == own
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_what_the_user_said_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "3")
    share_caches()
    assert (os.environ["TRITON_CACHE_DIR"], os.environ["TORCHINDUCTOR_COMPILE_THREADS"]) == ("/somewhere", "3")
