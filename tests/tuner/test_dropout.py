"""Tuning with dropout: the checker knows a right backend from ones that drop wrongly, and a whole tuning runs."""

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate
from tilewise.domain.problem import Dtype, Pass, Problem
from tilewise.domain.trial import Outcome
from tilewise.kernels import reference
from tilewise.kernels.backends import BACKENDS, supporting
from tilewise.kernels.backends.triton import Triton
from tilewise.kernels.call import Call
from tilewise.kernels.device import describe
from tilewise.tuner.correctness import Checker
from tilewise.tuner.crew import Crew
from tilewise.tuner.ledger import NOT_TRIED
from tilewise.tuner.tune import tune

from .fakes import BUDGET, CPU, Fake, register

FAKE = Candidate("fake")
PROBLEM = Problem(batch=2, heads=4, kv_heads=2, q_len=48, head_dim=16, dtype=Dtype.FP32, causal=True, dropout=True)
TRAINING = replace(PROBLEM, pass_=Pass.TRAINING)
Result = tuple[torch.Tensor, torch.Tensor]


def mask_of(call: Call, *shape: int, share: float | None = None, seed: int | None = None) -> torch.Tensor:
    """Return a fair mask (B, H, Q, K) of the call's seed; a shape with ones repeats it."""
    full = (call.problem.batch, call.problem.heads, call.problem.q_len, call.problem.kv_len)
    generator = torch.Generator().manual_seed(call.seed if seed is None else seed)
    drawn = torch.rand(shape or full, generator=generator) >= (call.dropout if share is None else share)
    return drawn.expand(full)


def with_mask(call: Call, keep: torch.Tensor) -> Result:
    out, lse = reference.attention(call, dtype=torch.float32, needs_grad=True, keep=keep)
    return out.to(call.query.dtype), lse


def fair(call: Call) -> Result:
    return with_mask(call, mask_of(call))


# what must be caught


def renormalised(call: Call) -> Result:
    (out, lse), (total, _) = fair(call), fair(replace(call, value=torch.ones_like(call.value)))
    return torch.where(total > 0, out / total.clamp_min(1e-30), 0), lse


def not_scaled(call: Call) -> Result:
    out, lse = fair(call)
    return out * (1 - call.dropout), lse


def scaled_as_for_a_tenth(call: Call) -> Result:
    out, lse = fair(call)
    return out * (1 - call.dropout) / 0.9, lse


def nothing_dropped(call: Call) -> Result:
    return with_mask(call, mask_of(call, share=0.0))


def everything_kept_but_scaled(call: Call) -> Result:
    return with_mask(call, torch.ones(1, 1, 1, 1, dtype=torch.bool).expand(mask_of(call).shape))


def too_many_dropped(call: Call) -> Result:
    return with_mask(call, mask_of(call, share=call.dropout + 0.05))


def one_mask_for_all_heads(call: Call) -> Result:
    problem = call.problem
    return with_mask(call, mask_of(call, problem.batch, 1, problem.q_len, problem.kv_len))


def one_mask_for_the_batch(call: Call) -> Result:
    problem = call.problem
    return with_mask(call, mask_of(call, 1, problem.heads, problem.q_len, problem.kv_len))


def whole_keys_dropped(call: Call) -> Result:
    problem = call.problem
    return with_mask(call, mask_of(call, problem.batch, problem.heads, 1, problem.kv_len))


def whole_queries_dropped(call: Call) -> Result:
    problem = call.problem
    return with_mask(call, mask_of(call, problem.batch, problem.heads, problem.q_len, 1))


def any_seed_is_one(call: Call) -> Result:
    return with_mask(call, mask_of(call, seed=1))


def lse_of_what_is_left(call: Call) -> Result:
    (out, lse), (total, _) = fair(call), fair(replace(call, value=torch.ones_like(call.value)))
    return out, lse + total[..., 0].transpose(1, 2).clamp_min(1e-30).log()


@pytest.mark.parametrize(
    ("planted", "tensor"),
    [
        (renormalised, "out"),
        (not_scaled, "out"),
        (scaled_as_for_a_tenth, "out"),
        (nothing_dropped, "dropout by share"),
        (everything_kept_but_scaled, "dropout by share"),
        (too_many_dropped, "dropout by"),
        (one_mask_for_all_heads, "dropout by head"),
        (one_mask_for_the_batch, "dropout by batch"),
        (whole_keys_dropped, "dropout by query"),
        (whole_queries_dropped, "dropout by key"),
        (any_seed_is_one, "dropout by seed"),
        (lse_of_what_is_left, "lse"),
    ],
)
def test_catches(planted: Callable[[Call], Result], tensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = Checker(PROBLEM, CPU, seed=0)
    register(monkeypatch, fair)
    assert checker.check(FAKE).worst <= 1
    register(monkeypatch, planted)
    error = checker.check(FAKE)
    assert error.worst > 1
    assert error.tensor.startswith(tensor)


def test_catches_gradients_of_another_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(call: Call) -> Result:
        (out, lse), (other, _) = fair(call), with_mask(call, mask_of(call, seed=1))
        return out.detach() + other - other.detach(), lse

    checker = Checker(TRAINING, CPU, seed=0)
    register(monkeypatch, fair)
    assert checker.check(FAKE).worst <= 1
    register(monkeypatch, planted)
    error = checker.check(FAKE)
    assert error.worst > 1
    assert error.tensor in ("d_query", "d_key", "d_value")


def unseeded(call: Call) -> Result:
    return with_mask(call, torch.rand(mask_of(call).shape) >= call.dropout)


def set_up_unseeded() -> None:
    BACKENDS["fake"] = Fake(unseeded)


def test_a_backend_that_does_not_know_its_seed_is_unsupported(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, unseeded)
    with Crew(CPU, compilers=0, setup=set_up_unseeded) as crew:
        tune(PROBLEM, device=CPU, database=sqlite, budget=BUDGET, backends=("fake",), crew=crew)
    with sqlite.read() as session:
        (trial,) = [
            trial
            for trial in TrialRepository(session).list(PROBLEM, describe(CPU).key)
            if trial.candidate.backend == "fake"
        ]
    assert trial.outcome is Outcome.UNSUPPORTED
    assert "the same seed drops other weights" in trial.message


# what must be accepted

KINDS = [
    TRAINING,
    replace(TRAINING, causal=False),
    replace(TRAINING, causal=False, window=(5, 3)),
    replace(TRAINING, mask="bool", causal=False),
    replace(TRAINING, mask="bias.b1", bias_grad=True, alibi=True),
    replace(TRAINING, softcap=True, kv_heads=1),
    replace(TRAINING, varlen=True, batch=3, kv_len=40),
    replace(TRAINING, q_len=1, kv_len=40),
]


@pytest.mark.parametrize("pass_", list(Pass))
@pytest.mark.parametrize("dtype", list(Dtype))
@pytest.mark.parametrize("problem", KINDS, ids=lambda problem: problem.key)
def test_accepts_every_backend_of_a_cpu(problem: Problem, dtype: Dtype, pass_: Pass) -> None:
    problem = replace(problem, dtype=dtype, pass_=pass_, bias_grad=problem.bias_grad and pass_ is Pass.TRAINING)
    checker = Checker(problem, CPU, seed=0)
    for backend in supporting(problem, describe(CPU)):
        error = checker.check(Candidate(backend.name))
        assert error.worst <= 1, f"{backend.name}: {error}"


@pytest.fixture
def triton_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A GPU, or the CPU with Triton in its interpreter and the configs that need no description of a GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    monkeypatch.setattr(Triton, "supports", lambda *_: None)
    monkeypatch.setattr(Triton, "spaces", lambda *_: {})
    return CPU


@pytest.mark.parametrize("problem", KINDS[:-1], ids=lambda problem: problem.key)
def test_accepts_triton(problem: Problem, triton_device: torch.device) -> None:
    problem = replace(problem, batch=3 if problem.varlen else 1, heads=2, kv_heads=1)
    error = Checker(problem, triton_device, seed=0).check(Candidate("triton"))
    assert error.worst <= 1, str(error)


def test_two_shares_are_checked_and_one_is_timed() -> None:
    checker = Checker(PROBLEM, CPU, seed=0)
    assert {case.name: case.call.dropout for case in checker.cases} == {
        "problem": 0.1,
        "masked rows": 0.1,
        "half dropped": 0.5,
    }
    assert checker.main.call.dropout == 0.1


def test_what_is_right_is_computed_once_per_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, fair)
    checker = Checker(PROBLEM, CPU, seed=0)
    computed: list[Call] = []
    attention = reference.attention
    checker.check(FAKE)

    def counted(call: Call, *, needs_grad: bool = False, **options: object) -> Result:
        if not needs_grad:  # the fake's own
            computed.append(call)
        return attention(call, needs_grad=needs_grad, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "attention", counted)
    checker.check(FAKE)
    assert computed == []
    register(monkeypatch, lambda call: with_mask(call, mask_of(call, seed=call.seed + 1)))
    checker.check(FAKE)
    assert len(computed) == 2 * len(checker.cases)


# a whole tuning


def set_up_interpreted() -> None:
    """Give a worker what `triton_device` gives this process."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [name for name in sys.modules if name.partition(".")[0] == "triton" and "_C" not in name]:
            del sys.modules[name]  # it decides as it is imported what its functions are
        Triton.supports = lambda *_: None  # type: ignore[method-assign]
        Triton.spaces = lambda *_: {}  # type: ignore[method-assign]


def test_a_training_step_with_dropout_is_tuned(sqlite: Database, triton_device: torch.device) -> None:
    problem = replace(TRAINING, batch=1, heads=2, q_len=32, kv_len=32)
    budget = dataclasses.replace(BUDGET, trials=4, patience=4)
    backends = ("triton", "plain", "sdpa_math")
    with Crew(triton_device, compilers=0, setup=set_up_interpreted) as crew:
        verdict = tune(problem, device=triton_device, database=sqlite, budget=budget, backends=backends, crew=crew)
    device = describe(triton_device)
    with sqlite.read() as session:
        trials = TrialRepository(session).list(problem, device.key)
    tried = {trial.candidate.backend: trial for trial in trials if trial.outcome not in NOT_TRIED}
    assert tried.keys() == {"sdpa", "sdpa_math", "plain", "triton"}
    assert {trial.outcome for trial in tried.values()} == {Outcome.OK}
    assert all(trial.measurement is not None for trial in tried.values())
    assert verdict.answer.evidence is not None
    assert verdict.answer.plan.forward in [finalist.candidate for finalist in verdict.answer.evidence.finalists]
