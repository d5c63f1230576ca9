"""Processes that measure have one cache of Triton, whoever compiled first in them."""

import os

import pytest
from triton import knobs

from tilewise.kernels.compilers import share_caches

NAMES = ("TRITON_CACHE_DIR", "TRITON_PTXAS_PATH", "TORCHINDUCTOR_COMPILE_THREADS")


def test_triton_keeps_its_own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    own, assembler = knobs.cache.dir, knobs.nvidia.ptxas.path
    share_caches()
    assert os.environ["TRITON_CACHE_DIR"] == knobs.cache.dir == own
    assert os.environ["TRITON_PTXAS_PATH"] == knobs.nvidia.ptxas.path == assembler
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == "1"


def test_what_the_user_said_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(NAMES):
        monkeypatch.setenv(name, str(number))
    share_caches()
    assert [os.environ[name] for name in NAMES] == ["0", "1", "2"]
