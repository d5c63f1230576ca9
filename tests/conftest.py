"""Without a GPU, Triton kernels run in Triton's interpreter; the switch must be set before triton is imported."""

import os
from pathlib import Path

import pytest
import torch


def has_cuda() -> bool:
    return torch.cuda.is_available()


if not has_cuda():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors here are small: beside other work on the machine, more threads only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A missing GPU is the one thing that may skip a test."""
    if has_cuda():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, empty, with none of the caller's settings: no test reads or writes the user's own."""
    for name in [name for name in os.environ if name.startswith("TILEWISE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TILEWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
