"""A session of its own for every test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.snapshot import Snapshot
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call
from tilewise.layers import attention, resolve, rotation, session

from .turning import DEVICE, Turns

Ran = list[Candidate]


@pytest.fixture(autouse=True)
def own_session() -> Iterator[None]:
    """Nothing configured, nothing resolved and nothing demoted, before and after."""

    def reset() -> None:
        session._settings = None
        session._clients.clear()
        session._changed()
        attention._resolved.clear()
        attention._resolved_before.clear()
        resolve.forget()

    reset()
    yield
    reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """What was run, in order: the backend with the config that reached it."""
    called: Ran = []
    for name, backend in BACKENDS.items():

        def forward(
            call: Call, config: object, name: str = name, inner: Callable[..., object] = backend.forward
        ) -> object:
            called.append(Candidate.of(name, forward=config))  # type: ignore[arg-type]
            return inner(call, config)

        monkeypatch.setattr(backend, "forward", forward)
    return called


@pytest.fixture
def configured(tmp_path: Path) -> Callable[..., Path]:
    """Write answers to a snapshot and make it this process's."""

    def write(*answers: Answer, name: str = "answers.json") -> Path:
        path = tmp_path / name
        path.write_bytes(Snapshot.of(answers).dumps())
        session.configure(snapshot=str(path))
        return path

    return write


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query (2, 24, 4, 16), key and value (2, 24, 2, 16), standard normal."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 24, heads, 16, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing compiled before, and nothing left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> Turns:
    """Each turn by a kernel from here on, and whether it was in place."""
    from tilewise.layers import rope_kernel

    assert rotation._runs_on(torch.empty(0, device=DEVICE).device)
    found: Turns = []
    inner = rope_kernel.turn

    def turn(source: torch.Tensor, result: torch.Tensor, *given: Any, **options: Any) -> None:
        found.append(result is source)
        inner(source, result, *given, **options)

    monkeypatch.setattr(rope_kernel, "turn", turn)
    return found


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs is an error."""
    from tilewise.layers import rope_kernel

    assert rotation._runs_on(torch.empty(0, device=DEVICE).device)

    def failing(*_: object, **__: object) -> None:
        raise AssertionError("the kernel ran")

    monkeypatch.setattr(rope_kernel, "turn", failing)
    monkeypatch.setattr(rope_kernel, "join", failing)
