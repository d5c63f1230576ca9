"""Values of the domain types for tests."""

from datetime import UTC, datetime

from tilewise.domain.answer import Answer, Evidence, Finalist, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement

DEVICE = "amd-epyc-9b14.avx512.2t"
PROBLEM = Problem(batch=1, heads=8, q_len=2048, head_dim=64, causal=True, window=(256, 0))
SOFTWARE = Software(torch="2.13.0", triton="3.7.1", kernels=(("cpu_tiled", "0123456789ab"), ("sdpa", "ba9876543210")))
TILED = Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", block_q=128, block_k=128, heads_per_chunk=4))
SDPA = Candidate("sdpa")


def measurement(median_ms: float, ratio: float | None = None) -> Measurement:
    return Measurement(median_ms=median_ms, p20_ms=median_ms * 0.98, p80_ms=median_ms * 1.03, samples=60, ratio=ratio)


def answer(
    problem: Problem = PROBLEM, *, device_key: str = DEVICE, version: int = 1, software: Software = SOFTWARE
) -> Answer:
    """An exact answer: the tiled kernel beats SDPA three times."""
    evidence = Evidence(
        job="job-1",
        measured=datetime(2026, 11, 22, 12, tzinfo=UTC),
        reference=SDPA,
        finalists=(
            Finalist(candidate=TILED, measurement=measurement(10, 1 / 3)),
            Finalist(candidate=SDPA, measurement=measurement(30, 1.0)),
        ),
        noise=0.01,
        trials=40,
        failed=1,
        seconds=12.5,
        reason="fastest in the final",
    )
    return Answer(
        problem=problem,
        device_key=device_key,
        plan=Plan(TILED),
        match=Match.EXACT,
        version=version,
        measured=problem,
        software=software,
        expected_ms=10.0,
        interval=(9.8, 10.3),
        regret=0.0,
        runner_up=SDPA,
        baseline_ms=30.0,
        evidence=evidence,
    )
