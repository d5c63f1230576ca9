"""tilewise.decode: what runs where nothing was measured, where something was, and what it refuses."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewise
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Plan
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import ConfigError, InputError, UnsupportedError
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call
from tilewise.kernels.inputs import random_call
from tilewise.layers import session

CPU = torch.device("cpu")
CASES: dict[str, dict[str, Any]] = {
    "full cache": {},
    "lengths": {"varlen": True},
    "several queries": {"varlen": True, "q_len": 4, "causal": True},
    "window": {"varlen": True, "q_len": 4, "window": (5, 0)},
    "window to both sides": {"varlen": True, "q_len": 4, "window": (5, 1)},
    "window, one query": {"varlen": True, "window": (5, 0)},
    "pages": {"varlen": True, "page_size": 16},
    "full pages": {"page_size": 16, "q_len": 3, "causal": True},
    "pages and window": {"varlen": True, "page_size": 16, "q_len": 3, "window": (5, 0)},
    "softcap": {"varlen": True, "softcap": True},
}


@pytest.fixture(autouse=True)
def own_session() -> Iterator[None]:
    """Nothing configured and nothing resolved, before and after."""

    def reset() -> None:
        session._settings = None
        session._clients.clear()
        session._changed()

    reset()
    yield
    reset()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ran, in order."""
    called: list[str] = []
    for name, backend in BACKENDS.items():

        def forward(call: Call, config: object, name: str = name, inner: Any = backend.forward) -> object:
            called.append(name)
            return inner(call, config)

        monkeypatch.setattr(backend, "forward", forward)
    return called


def call_of(case: str, **changes: Any) -> Call:
    sizes = {"batch": 5, "heads": 4, "kv_heads": 2, "q_len": 1, "kv_len": 48, "head_dim": 16, "dtype": Dtype.FP32}
    return random_call(Problem(**{**sizes, **CASES[case], **changes}), CPU, seed=0)


def decode(call: Call, **changes: Any) -> Any:
    given: dict[str, Any] = {
        "lengths": call.kv_lengths,
        "block_table": call.block_table,
        "window": call.problem.window,
        "softcap": call.softcap,
        **changes,
    }
    return tilewise.decode(call.query, call.key, call.value, **given)


@pytest.mark.parametrize("case", CASES)
def test_right_where_nothing_was_measured(case: str, ran: list[str]) -> None:
    call = call_of(case)
    expected, expected_lse = reference.attention(call)
    out = decode(call)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    assert ran == ["plain" if call.problem.page_size or call.softcap else "sdpa"]
    out, lse = decode(call, return_lse=True)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=2e-5, atol=2e-5)
    assert BACKENDS[ran[1]].gives_lse


@pytest.mark.parametrize("case", CASES)
def test_the_problem_that_is_looked_up(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One spelling per problem: what random_call was asked for is what decode asks for."""
    asked: list[Problem] = []
    client = session.client_for(CPU)
    answer = type(client).answer

    def recorded(self: Any, problem: Problem) -> Answer:
        asked.append(problem)
        return answer(self, problem)

    monkeypatch.setattr(type(client), "answer", recorded)
    call = call_of(case)
    decode(call)
    assert asked == [call.problem]
    decode(call)
    assert len(asked) == 1, "a second call looks nothing up"
    tilewise.configure()
    decode(call)
    assert len(asked) == 2, "changed settings do"


def test_causal_is_the_default_and_can_be_left() -> None:
    call = call_of("several queries")
    assert torch.equal(decode(call, window=None), decode(call, window=(-1, 0)))
    free = replace(call, problem=replace(call.problem, causal=False))
    expected, _ = reference.attention(free)
    torch.testing.assert_close(decode(call, window=(-1, -1)).double(), expected, rtol=2e-5, atol=2e-5)
    one = call_of("lengths")
    assert torch.equal(decode(one, window=None), decode(one, window=(-1, 7)))


def test_a_growing_cache_step_by_step() -> None:
    """Token after token, the result is that of attention over what is there so far."""
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.full((2, 1, 8, 2, 16), torch.nan).repeat(1, 2, 1, 1, 1).unbind(0)
    lengths = torch.zeros(2, dtype=torch.int32)
    for step in range(8):
        query, key, value = (torch.randn(2, 1, heads, 16, generator=generator) for heads in (4, 2, 2))
        keys[:, step], values[:, step] = key[:, 0], value[:, 0]
        lengths += 1
        expected = tilewise.attention(query, keys[:, : step + 1], values[:, : step + 1], causal=True)
        torch.testing.assert_close(tilewise.decode(query, keys, values, lengths=lengths), expected)


@pytest.mark.parametrize("name", ["plain", "sdpa_math"])
def test_a_measured_answer_runs(name: str, ran: list[str], tmp_path: Path) -> None:
    call = call_of("lengths", kv_len=128, batch=4)
    device = devices.describe(CPU)
    answer = Answer(
        problem=call.problem,
        device_key=device.key,
        plan=Plan(Candidate(name)),
        match=Match.EXACT,
        measured=call.problem,
        software=devices.software(DeviceKind.CPU),
    )
    path = tmp_path / "answers.json"
    path.write_bytes(Snapshot.of([answer]).dumps())
    tilewise.configure(snapshot=str(path))
    decode(call)
    shorter = replace(call, key=call.key[:3, :100], value=call.value[:3, :100], query=call.query[:3])
    decode(replace(shorter, kv_lengths=torch.tensor([100, 0, 1], dtype=torch.int32)))
    assert ran == [name, name], "a shorter cache and a smaller batch are of the same bucket"


def test_a_named_backend_that_cannot_run_here(ran: list[str], caplog: pytest.LogCaptureFixture) -> None:
    call = call_of("lengths")
    with caplog.at_level(logging.WARNING, "tilewise"):
        decode(call, backend="triton_decode")
    assert ran == ["sdpa"]
    assert "needs a CUDA device" in caplog.text
    with pytest.raises(UnsupportedError, match=r"triton_decode cannot run .*needs a CUDA device"):
        decode(call, backend="triton_decode", strict=True)
    with pytest.raises(ConfigError, match="unknown backend 'nope'"):
        decode(call, backend="nope")


def test_any_scale() -> None:
    call = replace(call_of("lengths"), scale=0.1)
    torch.testing.assert_close(decode(call, scale=0.1).double(), reference.attention(call)[0], rtol=2e-5, atol=2e-5)


def test_gradients_are_refused_and_not_forgotten() -> None:
    call = call_of("full cache")
    query = call.query.clone().requires_grad_()
    with pytest.raises(InputError, match="decode has no gradients"):
        tilewise.decode(query, call.key, call.value, lengths=None)
    with torch.no_grad():
        out = tilewise.decode(query, call.key, call.value, lengths=None)
    assert isinstance(out, torch.Tensor)
    assert not out.requires_grad


def test_too_many_queries() -> None:
    query, cache = torch.zeros(1, 17, 2, 16), torch.zeros(1, 32, 2, 16)
    with pytest.raises(InputError, match=r"at most 16 queries a row, got query \(1, 17, 2, 16\)"):
        tilewise.decode(query, cache, cache, lengths=None)


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_right_on_a_gpu(case: str) -> None:
    sizes = {"batch": 5, "heads": 16, "kv_heads": 2, "kv_len": 1024, "head_dim": 64, "dtype": Dtype.FP16}
    call = random_call(Problem(**{"q_len": 1, **sizes, **CASES[case]}), torch.device("cuda"), seed=0)
    expected, expected_lse = reference.attention(call)
    for backend in ("auto", "triton_decode"):
        out, lse = decode(call, backend=backend, strict=True, return_lse=True)
        torch.testing.assert_close(out.double(), expected, rtol=6e-3, atol=6e-3)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=6e-3, atol=6e-3)


@pytest.mark.gpu
def test_values_on_a_gpu_are_looked_at_in_debug_mode_only(
    monkeypatch: pytest.MonkeyPatch, no_waiting: Callable[[], AbstractContextManager[None]]
) -> None:
    call = random_call(
        Problem(batch=2, heads=4, q_len=1, kv_len=64, head_dim=16, varlen=True), torch.device("cuda"), seed=0
    )
    wrong = torch.tensor([65, 3], dtype=torch.int32, device="cuda")
    with no_waiting():
        decode(call, lengths=wrong, backend="triton_decode", strict=True)
    monkeypatch.setenv("TILEWISE_DEBUG", "1")
    with pytest.raises(InputError, match="lengths: expected 0 to 64"):
        decode(call, lengths=wrong, backend="triton_decode", strict=True)
