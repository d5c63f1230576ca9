"""flash-attn-4 compiled ahead: with a fake package what it is asked for, on a GPU that the real one finds it."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tilewise.domain.config import Candidate, Config
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import device as devices
from tilewise.kernels.ahead import compiles_ahead
from tilewise.kernels.backends import flash_cute_package as package
from tilewise.kernels.backends.flash_cute import FlashCute
from tilewise.tuner.compiling import Compiled, Compiling
from tilewise.tuner.correctness import Checker
from tilewise.tuner.crew import Crew, Pipeline
from tilewise.tuner.limits import Limits
from tilewise.tuner.processes import Worker

from ..kernels.test_backends import H200
from .tasks import compiled_by, run

# Keeps what it is asked for in the folder that is its cache while it is imported, a file for each.
INTERFACE = """
import json, os
from pathlib import Path
import torch
from torch._guards import active_fake_mode

FOLDER = Path(os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"])
ENABLED = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"]

def is_fake_mode():
    return active_fake_mode() is not None

def _keep(kind, **given):
    assert is_fake_mode() and ENABLED == "1"
    names = ("FLASH_ATTENTION_ARCH", "CUTE_DSL_ARCH", "FLASH_ATTENTION_NUM_SMS", "CUDA_VISIBLE_DEVICES")
    tensors = {n: [str(t.device), *t.shape] for n, t in given.items() if isinstance(t, torch.Tensor)}
    others = {n: v for n, v in given.items() if n not in tensors}
    seen = {"environment": {name: os.environ.get(name) for name in names}, "tensors": tensors, "others": others}
    (FOLDER / f"{kind}.{given['q'].shape[1]}.json").write_text(json.dumps(seen))

def _flash_attn_fwd(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, softmax_scale=None,
    causal=False, softcap=None, window_size_left=None, window_size_right=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_splits=1, pack_gqa=None, return_lse=False,
):
    if tile_mn == (64, 64):
        raise RuntimeError("these tiles do not compile")
    _keep("own" if tile_mn is None else "chosen", q=q, k=k, v=v, tile_mn=tile_mn, return_lse=return_lse)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32), None, None, None

def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False,
):
    _keep("bwd", q=q, out=out, dout=dout, lse=lse, deterministic=deterministic)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, deterministic=False,
    return_lse=False,
):
    return _flash_attn_fwd(q, k, v, causal=causal, return_lse=return_lse)[:2]
"""
CACHE = "CUTE_DSL_CACHE_ENABLED = os.getenv('FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED')"
FILES = {
    "flash_attn/cute/__init__.py": "",
    "flash_attn/cute/interface.py": INTERFACE,
    "flash_attn/cute/cache_utils.py": CACHE,
    **{f"{name}/__init__.py": "" for name in package.NEEDED},
}
SDPA = Candidate("sdpa")
PROBLEM = Problem.parse("training.bf16.b2.h8.kv2.q512.k512.d64.causal")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The package in this process, with a home for its cache."""

    def forget() -> None:
        for cached in (package.interface, package.internals, package.tunable, package._source):
            cached.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] in ("flash_attn", *package.NEEDED)]:
            del sys.modules[name]

    forget()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TILEWISE_HOME", str(folder / "home"))
    for name in (package.ENABLED, package.FOLDER):
        monkeypatch.delenv(name, raising=False)
    yield folder
    forget()


def set_up(folder: str) -> None:
    """Put the package into a worker, with a home for its cache."""
    sys.path.insert(0, folder)
    os.environ["TILEWISE_HOME"] = f"{folder}/home"


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker(Limits(), memory_gib=8, strict=True)
    yield one
    one.stop()


def kept(folder: Path) -> dict[str, Any]:
    cache = folder / "home" / "cache" / "flash-attn-4"
    return {path.name.removesuffix(".json"): json.loads(path.read_text()) for path in cache.glob("*.json")}


def test_a_worker_asks_for_what_the_real_calls_will(worker: Worker, installed: Path) -> None:
    space = FlashCute().spaces(PROBLEM, H200)["forward"]
    assert compiles_ahead("flash_cute")
    assert "flash_attn.cute.interface" not in sys.modules, "an import takes seconds"
    task = Compiling(
        problem=PROBLEM,
        candidate=Candidate.of("flash_cute", forward=space.default),
        device=H200,
        limits=Limits(),
        setup=functools.partial(set_up, str(installed)),
    )
    assert compiled_by(worker, task) == Compiled(Outcome.OK)
    found = kept(installed)
    # the problem, unequal lengths, equal ones, and fewer keys; each with its gradients
    assert found.keys() == {f"{kind}.{q_len}" for kind in ("own", "bwd") for q_len in (512, 211, 173)}
    forward, backward = found["own.512"], found["bwd.512"]
    assert forward["environment"] == {
        "FLASH_ATTENTION_ARCH": "sm_90", "CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_NUM_SMS": "132",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    assert forward["tensors"]["q"] == ["cuda:0", 2, 512, 8, 64]
    assert forward["tensors"]["k"] == ["cuda:0", 2, 512, 2, 64]
    assert forward["others"]["return_lse"] is True
    assert backward["tensors"]["dout"] == ["cuda:0", 2, 512, 8, 64]
    assert backward["tensors"]["lse"] == ["cuda:0", 2, 8, 512]

    chosen = next(config for config in space if (config["tile_m"], config["tile_n"]) == (128, 96))
    inference = dataclasses.replace(PROBLEM, pass_=Pass.INFERENCE)
    compiled_by(
        worker, dataclasses.replace(task, problem=inference, candidate=Candidate.of("flash_cute", forward=chosen))
    )
    assert kept(installed)["chosen.512"]["others"]["tile_mn"] == [128, 96]

    failing = Config.of(chosen.kernel, **{**chosen.as_dict(), "tile_m": 64, "tile_n": 64})
    failed = compiled_by(worker, dataclasses.replace(task, candidate=Candidate.of("flash_cute", forward=failing)))
    assert (failed.outcome, failed.message) == (Outcome.COMPILE_FAILED, "RuntimeError: these tiles do not compile")


def test_its_cache_is_on_while_it_is_imported_and_where_the_user_says(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert package.interface().ENABLED == "1"
    assert installed / "home" / "cache" / "flash-attn-4" == package.interface().FOLDER
    assert not {package.ENABLED, package.FOLDER} & os.environ.keys()
    assert "flash_attn.cute.interface" in sys.modules

    del sys.modules["flash_attn.cute.interface"]
    package.interface.cache_clear()
    monkeypatch.setenv(package.FOLDER, str(installed / "theirs"))
    assert installed / "theirs" == package.interface().FOLDER
    assert package.ENABLED not in os.environ


def test_it_is_not_compiled_ahead_where_nobody_would_find_it(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(package.ENABLED, "0")
    assert not compiles_ahead("flash_cute"), "the user has switched the cache off"
    monkeypatch.setenv(package.ENABLED, "1")
    assert compiles_ahead("flash_cute")
    monkeypatch.delenv(package.ENABLED)
    (installed / "file").write_text("")
    monkeypatch.setenv("TILEWISE_HOME", str(installed / "file"))
    assert not compiles_ahead("flash_cute"), "its folder cannot be made"
    monkeypatch.setenv("TILEWISE_HOME", str(installed / "home"))
    (installed / "flash_attn/cute/cache_utils.py").write_text("")
    package._source.cache_clear()
    assert not compiles_ahead("flash_cute"), "the version keeps nothing"
    (installed / "flash_attn/cute/interface.py").write_text("def _flash_attn_fwd(")
    package._source.cache_clear()
    package.tunable.cache_clear()
    assert not compiles_ahead("flash_cute"), "its source cannot be read"


def test_the_folder_without_a_home_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TILEWISE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert package.cache_folder() == Path("/somewhere/tilewise/flash-attn-4")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "key",
    [
        "inference.fp16.b2.h8.kv2.q512.k512.d128.causal",
        "inference.fp16.b2.h8.kv8.q512.k512.d56",
        "inference.bf16.b2.h8.kv2.q1.k1024.d64",
        "inference.fp16.b2.h8.kv8.q512.k512.d128.causal.window128.softcap",
        "training.bf16.b2.h8.kv2.q512.k512.d128.causal",
        "training.fp16.b6.h8.kv8.q512.k512.d64.causal.varlen",
    ],
)
def test_what_is_compiled_ahead_is_found_by_the_real_calls(key: str, worker: Worker, tmp_path: Path) -> None:
    """Checked in another process, with the cache that the worker filled: no new file, and the right results."""
    problem, device = Problem.parse(key), devices.select("cuda")
    described = devices.describe(device)
    absent = package.absent()
    assert FlashCute().supports(problem, described) == absent
    if absent is not None:
        return
    space = FlashCute().spaces(problem, described)["forward"]
    other = next(config for config in space if (config["tile_m"], config["tile_n"]) == (128, 64))
    checking = Worker(Limits(), memory_gib=64, strict=False)
    setup = functools.partial(_home, str(tmp_path))
    try:
        for config in (space.default, other):
            candidate = Candidate.of("flash_cute", forward=config)
            task = Compiling(problem=problem, candidate=candidate, device=described, limits=Limits(), setup=setup)
            assert compiled_by(worker, task) == Compiled(Outcome.OK)
            compiled = sorted(tmp_path.rglob("*.o"))
            assert compiled
            ended = run(checking, Checking(problem, candidate, str(device), str(tmp_path)))
            assert ended.outcome is Outcome.OK, ended.message
            assert ended.result <= 1  # type: ignore[operator]
            assert sorted(tmp_path.rglob("*.o")) == compiled, "nothing was compiled again"
    finally:
        checking.stop()


@pytest.mark.gpu
def test_an_heir_measures_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs no import of seconds is measured before; then the heir has the tensors and the package."""
    for name in (package.ENABLED, package.FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TILEWISE_HOME", str(tmp_path))
    problem = Problem.parse("inference.fp16.b2.h8.kv2.q2048.k2048.d128.causal")
    if package.absent() is not None:
        return
    with Crew(torch.device("cuda"), compilers=4) as crew:
        crew.begin(problem, seed=0)
        first, _ = crew.measuring
        pipeline = Pipeline(crew, crew.preparation(problem, SDPA, seed=0))
        default = FlashCute().default(problem, devices.describe(crew.device))
        pipeline.submit(default)
        pipeline.submit(SDPA)
        before = pipeline.take(best_ratio=float("inf")).trial
        assert (before.candidate, before.outcome) == (SDPA, Outcome.OK)
        assert crew.measurer is first
        after = pipeline.take(best_ratio=float("inf")).trial
        assert (after.candidate, after.outcome) == (default, Outcome.OK), after.message
        assert crew.measurer is not first
        assert first.pid is None
        final = pipeline.judge((SDPA, default), rounds=15, seconds=5).final
        assert final is not None


def _home(folder: str) -> None:
    os.environ["TILEWISE_HOME"] = folder
    for name in (package.ENABLED, package.FOLDER):  # what the user has set goes before our folder
        os.environ.pop(name, None)


@dataclasses.dataclass(frozen=True)
class Checking:
    """Check a candidate on a GPU, as the process that measures does; return its worst error as a share of its bound."""

    problem: Problem
    candidate: Candidate
    device: str
    folder: str

    def __call__(self, room: Any) -> float:
        room.enter("check", 120.0)
        _home(self.folder)
        return Checker(self.problem, torch.device(self.device), seed=0).check(self.candidate).worst
