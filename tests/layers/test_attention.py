"""attention(): what it computes, what it refuses, and which plan it runs."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tilewise
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import DeviceKind
from tilewise.domain.errors import ConfigError, DeviceError, SnapshotError, UnsupportedError
from tilewise.domain.problem import Dtype, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS
from tilewise.kernels.call import Call, mask_pattern
from tilewise.layers import session
from tilewise.layers.attention import attention

from ..domain.examples import SDPA
from ..domain.examples import answer as an_answer
from .conftest import Ran

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Configured = Callable[..., Path]
CPU = torch.device("cpu")
PLAIN = Candidate("plain")


def tiled(block_q: int = 16, block_k: int = 64, heads_per_chunk: int = 2) -> Candidate:
    config = Config.of("cpu_tiled", block_q=block_q, block_k=block_k, heads_per_chunk=heads_per_chunk)
    return Candidate.of("cpu_tiled", forward=config)


def expected(qkv: QKV, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference's result in float64, of the tensors' own graph."""
    query, key, value = qkv
    mask, slopes = options.get("mask"), options.get("alibi_slopes")
    problem = Problem(
        batch=query.shape[0], heads=query.shape[2], kv_heads=key.shape[2], q_len=query.shape[1], kv_len=key.shape[1],
        head_dim=query.shape[3], v_head_dim=value.shape[3], dtype=Dtype.FP32, causal=options.get("causal", False),
        window=options.get("window"), mask=mask_pattern(mask), alibi=slopes is not None,
        softcap=options.get("softcap", 0) > 0,
    )  # fmt: skip
    scale = options.get("scale", query.shape[3] ** -0.5)
    call = Call(problem, query, key, value, scale, mask, slopes, options.get("softcap", 0.0))
    return reference.attention(call, needs_grad=True)


def result(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    out = attention(*tensors, **options)
    assert isinstance(out, torch.Tensor)
    return out


OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (5, 2)},
    {"causal": True, "window": (5, 0)},
    {"scale": 0.5},
    {"softcap": 7.0, "causal": True},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 1.0])},
    {"alibi_slopes": torch.rand(2, 4, generator=torch.Generator().manual_seed(1)), "causal": True},
    {"mask": torch.rand(24, 24, generator=torch.Generator().manual_seed(1)) < 0.7},
    {"mask": torch.randn(2, 1, 1, 24, generator=torch.Generator().manual_seed(1)), "causal": True},
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(
        f"{name}{tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{name}={value}"
        for name, value in options.items()
    )


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_equals_the_reference(options: dict[str, Any], layout: str, return_lse: bool, qkv: QKV) -> None:
    wanted, wanted_lse = expected(qkv, **options)
    swapped = [tensor.transpose(1, 2).contiguous() if layout == "bhsd" else tensor for tensor in qkv]
    found = attention(*swapped, layout=layout, return_lse=return_lse, **options)
    if return_lse:
        assert isinstance(found, tuple)
        found, lse = found
        assert lse.dtype is torch.float32
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
    assert isinstance(found, torch.Tensor)
    out = found.transpose(1, 2) if layout == "bhsd" else found
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cpu_tiled"])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_gradients_equal_the_references(options: dict[str, Any], layout: str, backend: str, qkv: QKV) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    exact = [tensor.double().requires_grad_() for tensor in qkv]
    mask = options.get("mask")
    if mask is not None and mask.is_floating_point():
        leaves.append(mask.clone().requires_grad_())
        exact.append(mask.double().requires_grad_())
        options = {**options, "mask": leaves[3]}
    tensors = [leaf.transpose(1, 2) if layout == "bhsd" else leaf for leaf in leaves[:3]]
    out = result(*tensors, layout=layout, backend=backend, **options)
    out = out.transpose(1, 2) if layout == "bhsd" else out
    if len(exact) == 4:
        options = {**options, "mask": exact[3]}
    wanted, _ = expected((exact[0], exact[1], exact[2]), **options)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    for found, gradient in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(wanted, exact, grad_out.double()), strict=True
    ):
        torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5)


def test_only_a_mask_that_learns(qkv: QKV) -> None:
    bias = torch.zeros(4, 1, 24, requires_grad=True)
    result(*qkv, mask=bias).square().sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == bias.shape
    assert bool((bias.grad != 0).any())


def test_no_gradient_through_the_lse(qkv: QKV) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    _, lse = attention(*leaves, return_lse=True)
    assert not lse.requires_grad


def test_rows_with_nothing_to_attend(qkv: QKV) -> None:
    query, key, value = qkv
    out, lse = attention(query, key[:, :9], value[:, :9], causal=True, return_lse=True)
    assert bool((out[:, :15] == 0).all())
    assert bool((lse[:, :, :15] == -torch.inf).all())
    assert bool((result(query, key[:, :9], value[:, :9], causal=True)[:, :15] == 0).all())


@pytest.mark.parametrize("backend", ["sdpa", "plain", "cpu_tiled"])
def test_autocast_does_not_change_what_is_computed(backend: str, qkv: QKV) -> None:
    """The tensors have their dtypes already; a kernel's own float32 arithmetic is not for autocast to narrow."""
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = result(*leaves, causal=True, backend=backend)
    found = torch.autograd.grad(out.square().sum(), leaves)
    plain = result(*leaves, causal=True, backend=backend)
    assert out.dtype is torch.float32
    assert torch.equal(out, plain)
    for gradient, other in zip(found, torch.autograd.grad(plain.square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_an_unknown_backend(qkv: QKV) -> None:
    with pytest.raises(ConfigError, match="unknown backend 'nope'; expected one of sdpa"):
        attention(*qkv, backend="nope")


# which plan runs


def problem_of(qkv: QKV, **changes: Any) -> Problem:
    query, key, _ = qkv
    return Problem(**{
        "batch": query.shape[0], "heads": query.shape[2], "kv_heads": key.shape[2], "q_len": query.shape[1],
        "kv_len": key.shape[1], "head_dim": query.shape[3], "dtype": Dtype.FP32, **changes,
    })  # fmt: skip


def answered(problem: Problem, candidate: Candidate) -> Answer:
    found = an_answer(problem, device_key=devices.describe(CPU).key, software=devices.software(DeviceKind.CPU))
    return replace(found, plan=Plan(candidate))


def test_without_an_answer_torchs_own_choice_runs(qkv: QKV, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    result(*qkv)
    result(*qkv, softcap=5.0)
    assert ran == [SDPA, PLAIN]
    assert not caplog.records


def test_the_answers_plan_runs_with_its_config(qkv: QKV, ran: Ran, configured: Configured) -> None:
    configured(answered(problem_of(qkv, causal=True), tiled(32, 64, 1)))
    result(*qkv, causal=True)
    result(*qkv, causal=True)
    result(*qkv)
    assert ran == [tiled(32, 64, 1), tiled(32, 64, 1), SDPA]


def test_a_snapshot_in_the_data_folder_is_found(qkv: QKV, ran: Ran, home: Path, configured: Configured) -> None:
    path = configured(answered(problem_of(qkv), tiled()))
    home.mkdir()
    path.rename(home / "tilewise.snapshot.json")
    session.configure()
    result(*qkv)
    assert ran == [tiled()]


def test_an_answer_for_training_is_not_one_for_inference(qkv: QKV, ran: Ran, configured: Configured) -> None:
    configured(answered(problem_of(qkv, pass_="training"), tiled()))
    leaves = [tensor.clone().requires_grad_() for tensor in qkv]
    result(*leaves)
    with torch.no_grad():
        result(*leaves)
    result(*qkv)
    assert ran == [tiled(), SDPA, SDPA]


@pytest.mark.parametrize(
    "candidate", [tiled(block_q=17), tiled(block_k=4096), tiled(heads_per_chunk=3), Candidate("sdpa_cudnn"),
                  Candidate("gone"), Candidate.of("sdpa", forward=Config.of("sdpa", tile=16)),
                  Candidate.of("cpu_tiled", forward=Config.of("triton_forward", block_m=16))],
    ids=str,
)  # fmt: skip
def test_an_answer_that_cannot_run_here_is_refused(
    candidate: Candidate, qkv: QKV, ran: Ran, configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    configured(answered(problem_of(qkv), candidate))
    for _ in range(2):
        torch.testing.assert_close(result(*qkv).double(), expected(qkv)[0], rtol=1e-5, atol=1e-5)
    assert ran == [SDPA, SDPA]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "cannot run" in record.getMessage()
    with pytest.raises(UnsupportedError, match=r"cannot run .* leave out strict=True"):
        attention(*qkv, strict=True)


def test_an_answer_of_the_bucket_runs_at_shorter_lengths(ran: Ran, configured: Configured) -> None:
    """A decoding cache of 40 keys is in the bucket of 128, where a tile of 128 keys is allowed."""
    qkv = (torch.ones(1, 1, 4, 16), torch.ones(1, 40, 2, 16), torch.ones(1, 40, 2, 16))
    bucket = problem_of(qkv, causal=True).bucket()
    assert bucket.kv_len == 128
    configured(answered(bucket, tiled(16, 128, 2)))
    result(*qkv, causal=True)
    assert ran == [tiled(16, 128, 2)]


def test_a_named_backend_runs_with_its_best_known_config(qkv: QKV, ran: Ran, configured: Configured) -> None:
    found = answered(problem_of(qkv), SDPA)
    assert found.evidence is not None
    finalists = tuple(replace(f, candidate=c) for f, c in zip(found.evidence.finalists, (SDPA, tiled(32)), strict=True))
    configured(replace(found, evidence=replace(found.evidence, finalists=finalists)))
    result(*qkv, backend="cpu_tiled")
    result(*qkv, backend="plain")
    result(*qkv, causal=True, backend="cpu_tiled")
    assert ran == [tiled(32), PLAIN, Candidate("cpu_tiled")]


def test_a_named_backend_that_is_not_here(qkv: QKV, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    result(*qkv, backend="triton")
    assert ran == [SDPA]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(UnsupportedError, match="needs a CUDA device"):
        attention(*qkv, backend="triton", strict=True)


def test_a_named_backend_without_an_lse(qkv: QKV, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    _, lse = attention(*qkv, backend="sdpa", return_lse=True)
    torch.testing.assert_close(lse.double(), expected(qkv)[1], rtol=1e-5, atol=1e-5)
    assert ran[0].backend != "sdpa"
    assert "does not return the LSE" in caplog.text
    with pytest.raises(UnsupportedError, match="does not return the LSE"):
        attention(*qkv, backend="sdpa", return_lse=True, strict=True)


# what fails here


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiled kernel fails; returns how often it was called, as the length of a list."""
    calls: list[int] = []

    def forward(*_: object) -> object:
        calls.append(1)
        raise RuntimeError("it does not launch")

    monkeypatch.setattr(BACKENDS["cpu_tiled"], "forward", forward)
    return calls


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("learns", [False, True])
def test_a_plan_that_fails_is_demoted_with_one_warning(
    return_lse: bool,
    learns: bool,
    qkv: QKV,
    failing: list[int],
    configured: Configured,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configured(answered(problem_of(qkv, pass_="training" if learns else "inference"), tiled()))
    tensors = [tensor.clone().requires_grad_(learns) for tensor in qkv]
    for _ in range(3):
        found = attention(*tensors, return_lse=return_lse)
        out = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(out.detach().double(), expected(qkv)[0], rtol=1e-5, atol=1e-5)
        assert out.requires_grad == learns
    assert len(failing) == 1
    (record,) = caplog.records
    assert "it does not launch" in record.getMessage()
    assert "torch's own choice runs instead" in record.getMessage()


def test_a_demoted_plan_is_not_tried_again_at_the_next_length(
    failing: list[int], configured: Configured, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = (130, 131, 140, 200)
    qkv = (torch.ones(1, 1, 4, 16), torch.ones(1, 200, 2, 16), torch.ones(1, 200, 2, 16))
    configured(answered(problem_of(qkv).bucket(), tiled()))
    for kv_len in lengths:
        result(qkv[0], qkv[1][:, :kv_len], qkv[2][:, :kv_len])
    session.refresh(device="cpu")
    result(*qkv)
    assert len(failing) == 1
    assert len(caplog.records) == 1


@pytest.mark.usefixtures("failing")
def test_strict_raises_what_the_backend_raised(qkv: QKV, configured: Configured) -> None:
    configured(answered(problem_of(qkv), tiled()))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="it does not launch"):
            attention(*qkv, strict=True)


def test_out_of_memory_is_the_callers(qkv: QKV, configured: Configured, monkeypatch: pytest.MonkeyPatch) -> None:
    configured(answered(problem_of(qkv), tiled()))

    def forward(*_: object) -> object:
        raise torch.OutOfMemoryError("7 GiB")

    monkeypatch.setattr(BACKENDS["cpu_tiled"], "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        attention(*qkv)


def test_torchs_own_failure_is_not_hidden(qkv: QKV, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object) -> object:
        raise RuntimeError("torch is broken")

    monkeypatch.setattr(BACKENDS["sdpa"], "forward", forward)
    with pytest.raises(RuntimeError, match="torch is broken"):
        attention(*qkv)


def test_a_device_that_cannot_be_read_does_not_stop_a_step(
    qkv: QKV, ran: Ran, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def describe(_: torch.device) -> object:
        raise DeviceError("a CUDA device is read through NVML")

    monkeypatch.setattr(devices, "describe", describe)
    result(*qkv)
    result(*qkv, causal=True)
    assert ran == [SDPA, SDPA]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(DeviceError):
        attention(*qkv, strict=True)


def test_a_bad_setting_does_not_stop_a_step(
    qkv: QKV, ran: Ran, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TILEWISE_TIMEOUT", "soon")
    result(*qkv)
    assert ran == [SDPA]
    assert "TILEWISE_TIMEOUT" in caplog.text


# when the answers change


def test_the_answers_of_a_run_do_not_move_by_themselves(qkv: QKV, ran: Ran, configured: Configured) -> None:
    path = configured(answered(problem_of(qkv), tiled(16)))
    result(*qkv)
    other = configured(answered(problem_of(qkv), tiled(32)), name="other.json")
    session.configure(snapshot=str(path))
    session.ready(device="cpu")
    result(*qkv)
    path.write_bytes(other.read_bytes())
    result(*qkv)
    assert ran == [tiled(16)] * 3
    session.ready(device="cpu")
    result(*qkv)
    assert ran[3:] == [tiled(16)]
    session.refresh(device="cpu")
    result(*qkv)
    assert ran[4:] == [tiled(32)]


def test_configure_makes_remembered_plans_be_looked_up_again(qkv: QKV, ran: Ran, configured: Configured) -> None:
    result(*qkv)
    configured(answered(problem_of(qkv), tiled()))
    result(*qkv)
    session.configure()
    result(*qkv)
    assert ran == [SDPA, tiled(), SDPA]


def test_ready_makes_remembered_plans_be_looked_up_again(qkv: QKV, ran: Ran, configured: Configured) -> None:
    path = configured(answered(problem_of(qkv), tiled(16)))
    result(*qkv)  # seals what the file holds now
    path.write_bytes(configured(answered(problem_of(qkv), tiled(32)), name="other.json").read_bytes())
    session.configure(snapshot=str(path))
    table = session.ready(device="cpu")
    assert len(table) == 1
    result(*qkv)
    assert ran == [tiled(16), tiled(32)]


@pytest.mark.parametrize("source", ["http://127.0.0.1:9", "sqlite:////nowhere/tilewise.db", "/nowhere/answers.json"])
def test_ready_with_a_dead_source(source: str, qkv: QKV, ran: Ran, caplog: pytest.LogCaptureFixture) -> None:
    session.configure(source=source, timeout=5)
    assert len(session.ready(device="cpu")) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    result(*qkv)
    assert ran == [SDPA]


def test_ready_with_a_pinned_snapshot_that_is_gone(tmp_path: Path) -> None:
    session.configure(snapshot=str(tmp_path / "gone.json"))
    with pytest.raises(SnapshotError, match=r"the pinned snapshot .* cannot be had"):
        session.ready(device="cpu")


def test_answer_tells_what_would_run(qkv: QKV, configured: Configured) -> None:
    configured(answered(problem_of(qkv), tiled()))
    assert tilewise.answer(problem_of(qkv), "cpu").plan.forward == tiled()
    assert tilewise.answer(problem_of(qkv, causal=True), "cpu").plan.forward == SDPA


def test_one_client_per_device() -> None:
    assert session.client_for("cpu") is session.client_for(CPU)
