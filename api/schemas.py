"""The shape of the JSON that the service answers with, for its OpenAPI document.

The documents themselves are written by domain/codec.py; a test holds the two together.
"""

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_CANDIDATE: dict[str, Any] = {
    "backend": "triton",
    "configs": {"forward": {"kernel": "triton_forward", "values": {"block_m": 128, "block_n": 64, "num_warps": 8}}},
}
_SDPA: dict[str, Any] = {"backend": "sdpa", "configs": {}}
_PROBLEM = "inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"


def _measured(median: float, ratio: float) -> dict[str, Any]:
    return {
        "median_ms": median,
        "p20_ms": median * 0.99,
        "p80_ms": median * 1.01,
        "samples": 100,
        "ratio": ratio,
        "spread": 0.004,
        "mode": "eager",
        "peak_memory_bytes": 104857600,
        "clock_mhz": 1980,
        "power_w": 690.0,
        "temperature_c": 55,
        "power_state": "settled",
    }


_ANSWER: dict[str, Any] = {
    "problem": _PROBLEM,
    "device_key": "nvidia-h200.sm90.141g.700w",
    "plan": {"forward": _CANDIDATE, "backward": None},
    "match": "exact",
    "version": 3,
    "measured": _PROBLEM,
    "measured_on": None,
    "software": {
        "torch": "2.13.0",
        "triton": "3.7.1",
        "cuda": "13.0",
        "driver": "580.82",
        "cudnn": "91500",
        "flash_attn": None,
        "cute_dsl": None,
        "kernels": [["triton_forward", "0123456789ab"]],
    },
    "expected_ms": 0.5,
    "interval": [0.495, 0.505],
    "regret": 0.0,
    "runner_up": _SDPA,
    "baseline_ms": 1.0,
    "stale_loss": 0.02,
    "evidence": {
        "job": "0b5a7e9c3d1f4a6b8c0d2e4f6a8b0c1d",
        "measured": "2026-01-31T12:00:00Z",
        "reference": _SDPA,
        "finalists": [
            {"candidate": _CANDIDATE, "measurement": _measured(0.5, 0.5), "default": False},
            {"candidate": _SDPA, "measurement": _measured(1.0, 1.0), "default": True},
        ],
        "noise": 0.004,
        "trials": 80,
        "failed": 2,
        "seconds": 61.5,
        "reason": "fastest in the final",
    },
    "missed": "",
}

_NEVER_MEASURED = "nvidia-h200.sm90.141g.600w"
_PREDICTED = {
    **_ANSWER,
    "device_key": _NEVER_MEASURED,
    "match": "predicted",
    "measured_on": "nvidia-h200.sm90.141g.700w",
    "expected_ms": None,
    "interval": None,
    "regret": 0.08,
    "baseline_ms": None,
    "missed": f"device: {_PROBLEM} was not measured on {_NEVER_MEASURED}; {_PROBLEM} was on nvidia-h200.sm90.141g.700w",
}


class Config(BaseModel):
    kernel: str
    values: dict[str, bool | int | float | str]


class Candidate(BaseModel):
    """A backend, with the parameters of its kernels by role."""

    backend: str
    configs: dict[str, Config]


class Plan(BaseModel):
    """What to run; no backward: the forward backend's own."""

    forward: Candidate
    backward: Candidate | None


class Measurement(BaseModel):
    """Times in milliseconds; `ratio` is over the reference of the same interleaved run, below 1 is faster."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    ratio: float | None
    spread: float | None
    mode: Literal["eager", "graph"]
    peak_memory_bytes: int | None
    clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    power_state: str


class Finalist(BaseModel):
    candidate: Candidate
    measurement: Measurement
    default: bool = Field(description="Whether it is the config that its backend has without any search.")


class Evidence(BaseModel):
    """The interleaved final that an answer rests on."""

    job: str | None
    measured: datetime
    reference: Candidate
    finalists: list[Finalist]
    noise: float
    trials: int
    failed: int
    seconds: float
    reason: str


class Software(BaseModel):
    """Versions that the measurement depends on, and a source hash per kernel."""

    torch: str | None
    triton: str | None
    cuda: str | None
    driver: str | None
    cudnn: str | None
    flash_attn: str | None
    cute_dsl: str | None
    kernels: list[tuple[str, str]]


class Answer(BaseModel):
    """What to run for a problem on a device, and how much that can be trusted."""

    model_config = ConfigDict(json_schema_extra={"examples": [_ANSWER, _PREDICTED]})

    problem: str = Field(description="The key of the problem that was asked about.")
    device_key: str
    plan: Plan
    match: Literal["exact", "stale", "near", "predicted", "default"]
    version: int
    measured: str | None = Field(description="The key of the problem that the evidence is about; null for a default.")
    measured_on: str | None = Field(description="The device that a predicted answer was measured on; else null.")
    software: Software
    expected_ms: float | None = Field(
        description="Time of the plan in milliseconds; null where none was measured here."
    )
    interval: tuple[float, float] | None = Field(description="20th and 80th percentile in milliseconds.")
    regret: float | None = Field(
        description="Share of time lost against the best plan that holds 9 times in 10; null where nothing tells."
    )
    runner_up: Candidate | None
    baseline_ms: float | None = Field(description="Time of torch's own choice in the same final, in milliseconds.")
    stale_loss: float | None = Field(
        description="Share of time that the answer before this one, of other software, was seen to lose; else null."
    )
    evidence: Evidence | None
    missed: str = Field(description="What kept a better match away; empty for an exact one.")


class Snapshot(BaseModel):
    """A set of answers; `id` is the SHA-256 of the canonical JSON of all but itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "id": "5d41402abc4b2a76b9719d911017c5925d41402abc4b2a76b9719d911017c592",
                "schema": 1,
                "answers": [_ANSWER],
            }
        }
    )

    id: str
    schema_: int = Field(alias="schema")
    answers: list[Answer]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
