"""The flash_attn packages: what is asked of them, by fakes with their signatures, and the real one on a GPU.

A fake is a package on disk, for `supports` looks for files and imports nothing. It computes in plain torch and notes
what it was given.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.errors import UnsupportedError
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.kernels import device as devices
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS, flash, flash_cute, flash_cute_package
from tilewise.kernels.backends.flash import Flash
from tilewise.kernels.backends.flash_cute import KERNEL, FlashCute
from tilewise.kernels.inputs import random_call
from tilewise.kernels.run import backward, forward, run
from tilewise.layers.resolve import KERNEL_TYPES, resolve
from tilewise.tuner.correctness import Checker

from .cells import CELLS, CPU, TOLERANCE, assert_right, call_of, problem_of, this_cpu
from .test_backends import H200
from .test_packed import CELLS as PACKED
from .test_packed import problem_of as packed_problem

MATHS = '''
import torch
CALLS = []

def attend(q, k, v, scale, causal, left, right, softcap, slopes=None, lengths=None):
    """(out, lse) of BSHD tensors, or of packed ones; left and right are None where unbounded."""
    if lengths is not None:
        cu_q, cu_k, *longest = lengths
        assert [int(cu.diff().max()) <= most for cu, most in zip((cu_q, cu_k), longest)] == [True, True]
        edges = [edge for cu in (cu_q, cu_k) for edge in (cu.tolist(), cu.tolist()[1:])]
        parts = [
            attend(q[None, a:b], k[None, c:d], v[None, c:d], scale, causal, left, right, softcap, slopes)
            for a, b, c, d in zip(*edges)
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    group = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(group, 2).transpose(1, 2) for t in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(q.shape[1])[:, None] + k.shape[2] - q.shape[1]
    away = torch.arange(k.shape[2]) - i
    if slopes is not None:
        scores = scores - (slopes if slopes.dim() == 2 else slopes[None])[..., None, None] * away.abs()
    right = 0 if causal else right
    if right is not None:
        scores = scores.masked_fill(away > right, -torch.inf)
    if left is not None:
        scores = scores.masked_fill(away < -left, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    return (weights @ v).transpose(1, 2), torch.logsumexp(scores, -1).float()
'''
# The arguments of 4.0.0b36; TUNING is what versions may lack.
CUTE = (
    MATHS
    + """
def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    softmax_scale=None, causal=False, softcap=None, window_size_left=None, window_size_right=None,
    learnable_sink=None, TUNING num_threads=384, _arch=None,
    score_mod=None, mask_mod=None, return_lse=False, out=None, lse=None,
):
    given = dict(locals())
    CALLS.append(("fwd", given))
    assert return_lse
    lengths = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out, lse = attend(
        q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap, lengths=lengths
    )
    return out, lse, None, None, None

def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, cu_seqlens_q=None, cu_seqlens_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
):
    CALLS.append(("bwd", dict(locals())))
    lengths = None if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        again, _ = attend(
            *leaves, softmax_scale, causal, window_size_left, window_size_right, softcap, lengths=lengths
        )
    return torch.autograd.grad(again, leaves, dout)

def flash_attn_func(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
):
    CALLS.append(("own", dict(locals())))
    assert return_lse
    return attend(q, k, v, softmax_scale, causal, *window_size, softcap)

def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, window_size=(None, None), softcap=0.0, deterministic=False, return_lse=False,
):
    CALLS.append(("packed", dict(locals())))
    assert return_lse
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return attend(q, k, v, softmax_scale, causal, *window_size, softcap, lengths=lengths)
"""
)
TUNING = "tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_splits=1, pack_gqa=None,"
FLASH_2 = (
    MATHS
    + """
def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    CALLS.append(("own", dict(locals())))
    left, right = (None if side == -1 else side for side in window_size)
    out, lse = attend(q, k, v, softmax_scale, causal, left, right, softcap, alibi_slopes)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf), None

def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):
    CALLS.append(("packed", dict(locals())))
    left, right = (None if side == -1 else side for side in window_size)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    out, lse = attend(q, k, v, softmax_scale, causal, left, right, softcap, alibi_slopes, lengths)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf), None
"""
)
PACKAGES = ("flash_attn", "cutlass", "quack", "tvm_ffi", "einops")
Install = Callable[..., list[tuple[str, dict[str, Any]]]]


def _forget() -> dict[str, Any]:
    """Take every module of the packages out of sys.modules and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in PACKAGES]
    importlib.invalidate_caches()
    package = flash_cute_package
    for cached in (package.interface, package.internals, package.tunable, package._source, flash._function):
        cached.cache_clear()
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture
def empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without any of the packages."""
    before = _forget()
    kept = [entry for entry in sys.path if not any((Path(entry or ".") / name).exists() for name in PACKAGES)]
    monkeypatch.setattr(sys, "path", kept)
    yield
    _forget()
    sys.modules.update(before)


@pytest.fixture
def install(empty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:  # noqa: ARG001
    """Put a fake package in place and return the list of the calls it will get."""

    def put(files: dict[str, str], *, calls_of: str = "") -> list[tuple[str, dict[str, Any]]]:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        calls: list[tuple[str, dict[str, Any]]] = importlib.import_module(calls_of).CALLS if calls_of else []
        return calls

    return put


def cute(tuning: str = TUNING, *, without: str = "") -> dict[str, str]:
    """Return the files of flash-attn-4 and what it needs; the real one has no flash_attn/__init__.py either."""
    needed = {f"{name}/__init__.py": "" for name in PACKAGES[1:] if name != without}
    source = CUTE.replace("TUNING", tuning)
    return {**needed, "flash_attn/cute/__init__.py": "", "flash_attn/cute/interface.py": source}


OURS = [cell for cell, fields in CELLS.items() if not {"mask", "alibi"} & fields.keys()]
OURS_PACKED = [cell for cell, fields in PACKED.items() if "alibi" not in fields]
CHOSEN = Config.of(
    KERNEL, tile_m=192, tile_n=112, mma_pv_is_rs=False, intra_wg_overlap=True, pack_gqa=False, num_splits=1
)


def own(problem: Problem) -> Config:
    group = problem.heads > problem.kv_heads
    return Config.of(KERNEL, tile_m=0, tile_n=0, mma_pv_is_rs=True, intra_wg_overlap=True, pack_gqa=group, num_splits=1)


# flash_attn.cute


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("cell", OURS)
def test_cute_is_asked_for_what_the_problem_is(cell: str, chosen: bool, install: Install) -> None:
    calls = install(cute(), calls_of="flash_attn.cute.interface")
    call = call_of(problem_of(cell))
    out, lse = run(call, Candidate.of("flash_cute", forward=CHOSEN if chosen else own(call.problem)))
    assert lse is not None
    assert_right(call, out, lse)
    assert [name for name, _ in calls] == ["fwd" if chosen else "own"]


@pytest.mark.parametrize("cell", OURS)
def test_gradients_behind_a_chosen_config(cell: str, install: Install) -> None:
    calls = install(cute(), calls_of="flash_attn.cute.interface")
    call = call_of(problem_of(cell, pass_=Pass.TRAINING))
    leaves = [[t.detach().requires_grad_() for t in (call.query, call.key, call.value)] for _ in range(2)]
    found = []
    for which, name in zip(leaves, ("flash_cute", "plain"), strict=True):
        candidate = Candidate.of(name, forward=CHOSEN if name == "flash_cute" else None)
        out, lse = run(call.with_tensors(*which), candidate)
        assert lse is not None
        assert not lse.requires_grad
        found.append(torch.autograd.grad(out, which, torch.ones_like(out)))
    for gradient, expected in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32])
    assert [name for name, _ in calls] == ["fwd", "bwd"]


@pytest.mark.parametrize("chosen", [False, True])
def test_its_own_backward_without_a_graph(chosen: bool, install: Install) -> None:
    calls = install(cute(), calls_of="flash_attn.cute.interface")
    call = call_of(problem_of("window", pass_=Pass.TRAINING))
    out, lse, ran = forward(call, Candidate.of("flash_cute", forward=CHOSEN if chosen else None))
    assert lse is not None
    assert ran.saved
    found = backward(call, ran, out, lse, torch.ones_like(out), (True, True, True, False))
    for gradient, expected in zip(
        (found.query, found.key, found.value), reference.gradients(call, torch.ones_like(out)), strict=True
    ):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in calls] == ["fwd" if chosen else "own", "bwd"]


def test_a_version_with_other_parameters_saves_nothing(install: Install) -> None:
    install(cute("m_block_size=128, n_block_size=128,"), calls_of="flash_attn.cute.interface")
    *_, ran = forward(call_of(problem_of("causal", pass_=Pass.TRAINING)), Candidate("flash_cute"))
    assert not ran.saved


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("cell", OURS_PACKED)
def test_cute_with_packed_sequences(cell: str, chosen: bool, install: Install) -> None:
    calls = install(cute(), calls_of="flash_attn.cute.interface")
    call = random_call(packed_problem(cell, pass_=Pass.TRAINING), CPU, seed=0, empty=True)
    leaves = [tensor.detach().requires_grad_() for tensor in (call.query, call.key, call.value)]
    candidate = Candidate.of("flash_cute", forward=CHOSEN if chosen else own(call.problem))
    out, lse = run(call.with_tensors(*leaves), candidate)
    assert_right(call, out.detach(), lse)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    for gradient, expected in zip(found, reference.gradients(call, torch.ones_like(out)), strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=1e-4)
    assert [name for name, _ in calls] == (["fwd", "bwd"] if chosen else ["packed"])


def test_what_a_config_sets(install: Install) -> None:
    calls = install(cute(), calls_of="flash_attn.cute.interface")
    call = call_of(problem_of("gqa"))
    run(call, Candidate.of("flash_cute", forward=CHOSEN))
    given = calls[-1][1]
    assert (given["tile_mn"], given["mma_pv_is_rs"], given["intra_wg_overlap"]) == ((192, 112), False, True)
    assert (given["pack_gqa"], given["num_splits"]) == (False, 1)
    unpacked = Config.of(KERNEL, **{**own(call.problem).as_dict(), "pack_gqa": False})
    run(call, Candidate.of("flash_cute", forward=unpacked))
    assert (calls[-1][0], calls[-1][1]["tile_mn"], calls[-1][1]["pack_gqa"]) == ("fwd", None, False)
    split = Config.of(KERNEL, **{**own(call.problem).as_dict(), "num_splits": 4})
    run(call, Candidate.of("flash_cute", forward=split))
    assert (calls[-1][1]["num_splits"], calls[-1][1]["pack_gqa"]) == (4, None)


def test_a_version_with_other_parameters_keeps_its_own_choice(install: Install) -> None:
    calls = install(cute("m_block_size=128, n_block_size=128,"), calls_of="flash_attn.cute.interface")
    call = call_of(problem_of("causal"))
    assert FlashCute().supports(replace(call.problem, dtype=Dtype.FP16), H200) is None
    assert FlashCute().spaces(call.problem, H200).get("forward") is None
    assert_right(call, *run(call, Candidate("flash_cute")))
    assert [name for name, _ in calls] == ["own"]
    with pytest.raises(UnsupportedError, match=r"take other parameters than those of 4\.0\.0b36"):
        run(call, Candidate.of("flash_cute", forward=CHOSEN))


def test_a_package_that_does_not_import(install: Install) -> None:
    install({**cute(), "flash_attn/cute/interface.py": "raise ImportError('libcuda.so.1 is missing')"})
    call = call_of(problem_of("causal"))
    assert FlashCute().spaces(call.problem, H200).get("forward") is None
    with pytest.raises(UnsupportedError, match=r"cannot be imported: libcuda\.so\.1 is missing"):
        run(call, Candidate("flash_cute"))


HALF = Problem(batch=1, heads=8, q_len=64, head_dim=64)


@pytest.mark.usefixtures("empty")
def test_the_reason_without_packages() -> None:
    assert FlashCute().supports(HALF, H200) == (
        "flash_attn.cute is not installed: pip install 'tilewise[flash]' (CUDA 13: 'flash-attn-4[cu13]')"
    )
    reason = Flash().supports(HALF, H200)
    assert reason is not None
    assert reason.startswith("flash_attn 2 is not installed; it is built from source: ")


@pytest.mark.parametrize("name", PACKAGES[1:])
def test_the_reason_without_what_it_needs(name: str, install: Install) -> None:
    install(cute(without=name))
    reason = FlashCute().supports(HALF, H200)
    assert reason is not None
    assert f"installed without {flash_cute_package.NEEDED[name]}:" in reason
    assert "flash_attn.cute.interface" not in sys.modules, "nothing is imported to find out"


def test_each_package_is_told_from_the_other(install: Install) -> None:
    install(cute())
    assert FlashCute().supports(HALF, H200) is None
    assert "flash_attn 2 is not installed" in str(Flash().supports(HALF, H200))
    install({"flash_attn/__init__.py": "raise ImportError", "flash_attn/flash_attn_interface.py": ""})
    assert FlashCute().supports(HALF, H200) is None
    assert Flash().supports(HALF, H200) is None


def card(arch: str) -> Device:
    return replace(H200, arch=arch, shared_memory=166912 if arch == "sm_80" else 232448)


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_75", {}, "needs sm_80 to sm_12x, this is sm_75"),
        ("sm_80", {}, None),
        ("sm_80", {"pass_": Pass.TRAINING}, "its backward needs sm_90 or newer, this is sm_80"),
        ("sm_90", {"pass_": Pass.TRAINING, "softcap": True, "deterministic": True}, None),
        ("sm_120", {"pass_": Pass.TRAINING, "softcap": True}, "its backward on sm_120 has no softcap"),
        ("sm_90", {"pass_": Pass.TRAINING, "head_dim": 192, "v_head_dim": 128}, None),
        ("sm_90", {"pass_": Pass.TRAINING, "head_dim": 192, "v_head_dim": 128, "kv_heads": 2}, "needs one head_dim"),
        ("sm_90", {"dtype": Dtype.FP32}, "needs fp16 or bf16"),
        ("sm_90", {"head_dim": 56, "window": (5, 7)}, None),
        ("sm_90", {"head_dim": 20}, "needs head_dim in multiples of 8"),
        ("sm_90", {"v_head_dim": 20}, "needs head_dim in multiples of 8"),
        ("sm_90", {"head_dim": 192, "v_head_dim": 128}, None),
        ("sm_90", {"head_dim": 256}, None),
        ("sm_90", {"head_dim": 264}, "needs head_dim of at most 256"),
        ("sm_100", {"head_dim": 192, "v_head_dim": 128}, None),
        ("sm_100", {"head_dim": 160}, "needs head_dim of at most 128 on this device"),
        ("sm_90", {"mask": "bias"}, "no mask"),
        ("sm_90", {"alibi": True}, "no alibi"),
        ("sm_90", {"varlen": True}, None),
        ("sm_90", {"varlen": True, "mask": "bool"}, "no mask"),
        ("sm_90", {"varlen": True, "q_len": 16}, "no varlen"),
    ],
)
def test_what_cute_supports(arch: str, changes: dict[str, Any], reason: str | None, install: Install) -> None:
    install(cute())
    found = FlashCute().supports(replace(HALF, **{"v_head_dim": 0, **changes}), card(arch))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


# Ran on an H200, or did not, by head_dim: bench/results has the landscape of the tuning these come from.
RAN = [(128, 192, 112, False), (128, 192, 80, True), (128, 128, 176, True), (128, 64, 192, True), (56, 192, 96, True),
       (96, 192, 112, True), (96, 192, 144, False), (96, 64, 192, False)]  # fmt: skip
DID_NOT = [(128, 192, 144, False), (128, 128, 160, False), (128, 64, 192, False)]
SLOW = [(128, 192, 144, True), (96, 192, 128, True), (96, 192, 144, True)]  # spills: 1.7 to 3 times the best


def test_the_space_on_an_h200(install: Install) -> None:
    install(cute())
    for table, inside in ((RAN, True), (DID_NOT, False), (SLOW, False)):
        for head_dim, tile_m, tile_n, in_registers in table:
            space = FlashCute().spaces(replace(HALF, head_dim=head_dim, v_head_dim=0), H200).get("forward")
            assert space is not None
            values = {"tile_m": tile_m, "tile_n": tile_n, "mma_pv_is_rs": in_registers}
            config = Config.of(KERNEL, **{**space.default.as_dict(), **values})
            assert (config in space) == inside, f"{config}: {space.why_not(config)}"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("head_dims", [(56, 56), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_default_is_the_packages_own_choice(
    arch: str, head_dims: tuple[int, int], kv_heads: int, install: Install
) -> None:
    install(cute())
    problem = replace(HALF, head_dim=head_dims[0], v_head_dim=head_dims[1], kv_heads=kv_heads)
    space = FlashCute().spaces(problem, card(arch)).get("forward")
    assert space is not None
    configs = list(space)
    assert configs.count(space.default) == 1
    assert space.default == own(problem)
    assert flash_cute._options(problem, space.default) == {}
    assert all(flash_cute._options(problem, config) for config in configs if config != space.default)
    assert {config["num_splits"] for config in configs} == ({1, 2, 4, 8, 16} if arch == "sm_100" else {1})
    assert (len({config["tile_n"] for config in configs}) > 1) == (arch != "sm_100")


# flash_attn 2


@pytest.mark.parametrize("cell", [cell for cell, fields in CELLS.items() if "mask" not in fields])
def test_flash_2_is_asked_for_what_the_problem_is(cell: str, install: Install) -> None:
    calls = install(
        {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH_2},
        calls_of="flash_attn.flash_attn_interface",
    )
    call = call_of(problem_of(cell))
    out, lse = run(call, Candidate("flash"))
    assert lse is not None
    assert_right(call, out, lse)
    assert (len(calls), calls[0][1]["return_attn_probs"]) == (1, True)


@pytest.mark.parametrize("cell", PACKED)
def test_flash_2_with_packed_sequences(cell: str, install: Install) -> None:
    calls = install(
        {"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH_2},
        calls_of="flash_attn.flash_attn_interface",
    )
    call = random_call(packed_problem(cell), CPU, seed=0, empty=True)
    assert_right(call, *run(call, Candidate("flash")))
    assert [name for name, _ in calls] == ["packed"]


def test_flash_2_before_its_lse_was_packed(install: Install) -> None:
    old = FLASH_2.replace("alibi_slopes, lengths)", "alibi_slopes, lengths)\n    lse = lse.expand(6, 2, -1)")
    install({"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": old})
    call = random_call(packed_problem("causal"), CPU, seed=0)
    with pytest.raises(UnsupportedError, match=r"its LSE of packed sequences is \(6, 2, \d+\), .* 2\.6\.2 or newer"):
        run(call, Candidate("flash"))


def test_flash_2_that_is_too_old_or_broken(install: Install) -> None:
    old = "def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, return_attn_probs=False): ..."
    install({"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": old})
    call = call_of(problem_of("causal"))
    with pytest.raises(UnsupportedError, match=r"takes no alibi_slopes, deterministic, softcap, window_size; build"):
        run(call, Candidate("flash"))
    _forget()
    install({"flash_attn/__init__.py": "raise ImportError('undefined symbol')"})
    with pytest.raises(UnsupportedError, match=r"cannot be imported: undefined symbol; build it again"):
        run(call, Candidate("flash"))


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("sm_75", {}, "needs sm_80 or newer, this is sm_75"),
        ("sm_80", {"pass_": Pass.TRAINING, "alibi": True, "softcap": True, "deterministic": True}, None),
        ("sm_90", {"dtype": Dtype.FP32}, "needs fp16 or bf16"),
        ("sm_90", {"v_head_dim": 128}, "needs one head_dim of at most 256"),
        ("sm_90", {"mask": "bool"}, "no mask"),
        ("sm_90", {"varlen": True}, None),
        ("sm_90", {"varlen": True, "q_len": 16}, "no varlen"),
    ],
)
def test_what_flash_2_supports(arch: str, changes: dict[str, Any], reason: str | None, install: Install) -> None:
    install({"flash_attn/__init__.py": "", "flash_attn/flash_attn_interface.py": FLASH_2})
    assert Flash().supports(replace(HALF, **changes), card(arch)) == reason


def test_neither_runs_on_a_cpu() -> None:
    assert Flash().supports(HALF, this_cpu()) == FlashCute().supports(HALF, this_cpu()) == "needs a CUDA device"


# what a layer's kernel_type "flash" is


@pytest.mark.parametrize(
    ("present", "runs"),
    [
        (("flash_cute", "flash", "sdpa_flash"), "flash_cute"),
        (("flash", "sdpa_flash"), "flash"),
        (("sdpa_flash",), "sdpa_flash"),
        ((), "sdpa"),
    ],
)
def test_flash_is_the_best_that_is_there(
    present: tuple[str, ...], runs: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("flash_cute", "flash", "sdpa_flash"):
        reason = None if name in present else "absent"
        monkeypatch.setattr(type(BACKENDS[name]), "supports", lambda _self, _problem, _device, reason=reason: reason)
    found = resolve(problem_of("causal"), CPU, KERNEL_TYPES["flash"], return_lse=False, strict=False)
    assert found.candidate == Candidate(runs)
    assert ("sdpa_flash cannot run" in caplog.text) == (not present)


# on a GPU that has flash_attn.cute

PROBLEMS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "more queries": {"causal": True, "q_len": 300, "kv_len": 200},
    "fewer queries": {"causal": True, "q_len": 200, "kv_len": 300},
    "window": {"window": (70, 30)},
    "window, open to the right": {"window": (70, -1)},
    "causal window": {"window": (70, 0)},
    "softcap": {"softcap": True, "causal": True},
    "head_dim 56": {"causal": True, "head_dim": 56},
    "192 and 128": {"causal": True, "head_dim": 192, "v_head_dim": 128, "kv_heads": 4},
    "packed": {"varlen": True},
    "packed, causal": {"varlen": True, "causal": True},
    "packed, window": {"varlen": True, "window": (70, 30), "kv_len": 300},
}


def gpu_with(problem: Problem) -> torch.device | None:
    """Return the GPU if flash_attn.cute can run `problem` there; where the package is absent, its reason is tested."""
    device = devices.select("cuda")
    reason = FlashCute().supports(problem, devices.describe(device))
    absent = flash_cute_package.absent()
    assert reason == absent
    return device if absent is None else None


@pytest.mark.gpu
@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("name", PROBLEMS)
def test_cute_on_a_gpu(name: str, pass_: Pass) -> None:
    sizes = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 384, "head_dim": 128, "dtype": Dtype.BF16}
    problem = Problem(**{**sizes, **PROBLEMS[name], "pass_": pass_})
    device = gpu_with(problem)
    if device is None:
        return
    error = Checker(problem, device, seed=0).check(Candidate("flash_cute"))
    assert error.worst <= 1, str(error)


@pytest.mark.gpu
@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("values", [{"tile_m": 128, "tile_n": 96}, {"pack_gqa": False}])
def test_a_chosen_config_on_a_gpu(values: dict[str, Any], pass_: Pass) -> None:
    problem = Problem(batch=2, heads=4, kv_heads=2, q_len=500, head_dim=128, causal=True, pass_=pass_)
    device = gpu_with(problem)
    if device is None:
        return
    space = FlashCute().spaces(problem, devices.describe(device)).get("forward")
    assert space is not None, "the installed version's internal functions are those this was written for"
    config = Config.of(KERNEL, **{**space.default.as_dict(), **values})
    error = Checker(problem, device, seed=0).check(Candidate.of("flash_cute", forward=config))
    assert error.worst <= 1, str(error)
