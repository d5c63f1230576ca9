"""Which problems are near, and what a search of a new one takes from them."""

import dataclasses
import math

import pytest

from tilewise.db.devices import DeviceRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software
from tilewise.domain.trial import Measurement, Outcome, Stage, Trial
from tilewise.kernels.device import describe
from tilewise.tuner.neighbours import FIRST, NEAREST, distance, nearest, of_kernel

from .fakes import CPU

BASE = Problem(batch=1, heads=8, q_len=1024, head_dim=64, dtype=Dtype.FP16, causal=True)
HERE = describe(CPU)
OTHER_CPU = dataclasses.replace(HERE, units=64, arch="x86_64.avx2")
GPU = Device(**{**{f.name: getattr(HERE, f.name) for f in dataclasses.fields(HERE)}, "kind": "cuda", "name": "gpu"})


def config(block: int) -> Config:
    return Config.of("k", block=block)


def keep(database: Database, problem: Problem, device: Device, ratios: dict[int, float | None]) -> None:
    with database.write() as session:
        DeviceRepository(session).save(device)
        for block, ratio in ratios.items():
            measured = None if ratio is None else Measurement(median_ms=1, p20_ms=1, p80_ms=1, samples=9, ratio=ratio)
            trial = Trial(
                candidate=Candidate.of("b", forward=config(block)),
                stage=Stage.FORWARD,
                outcome=Outcome.FAILED if ratio is None else Outcome.OK,
                measurement=measured,
            )
            TrialRepository(session).add(trial, problem=problem, device_key=device.key, software=Software(torch="2"))


@pytest.mark.parametrize(
    ("changes", "nearer_than"),
    [
        ({"q_len": 2048, "kv_len": 2048}, {"q_len": 8192, "kv_len": 8192}),
        ({"dtype": Dtype.BF16}, {"head_dim": 128, "v_head_dim": 128}),
        ({"batch": 2}, {"causal": False}),
        ({"softcap": True}, {"mask": "bias.b1"}),
    ],
)
def test_what_is_near(changes: dict[str, object], nearer_than: dict[str, object]) -> None:
    near, far = (dataclasses.replace(BASE, **each) for each in (changes, nearer_than))  # type: ignore[arg-type]
    assert distance(BASE, BASE) == 0 < distance(BASE, near) < distance(BASE, far)
    assert distance(near, BASE) == distance(BASE, near)


@pytest.mark.parametrize("changes", [{"dtype": Dtype.FP32}, {"q_len": 1, "causal": False}])
def test_what_teaches_nothing(changes: dict[str, object]) -> None:
    assert math.isinf(distance(BASE, dataclasses.replace(BASE, **changes)))  # type: ignore[arg-type]


def test_the_same_device_first_and_no_other_kind(sqlite: Database) -> None:
    twice, thrice = (dataclasses.replace(BASE, q_len=n, kv_len=n) for n in (2048, 3072))
    keep(sqlite, BASE, HERE, {1: 0.5})  # the problem itself: a resumed search knows it already
    keep(sqlite, BASE, OTHER_CPU, {2: 0.5})
    keep(sqlite, BASE, GPU, {3: 0.5})
    keep(sqlite, twice, HERE, {4: 0.5})
    keep(sqlite, thrice, HERE, {5: None})  # nothing of it was right
    found = nearest(sqlite, BASE, HERE)
    assert [each.problem for each in found] == [twice, BASE]
    assert len(found) == NEAREST
    assert found[0].distance < found[1].distance
    assert nearest(sqlite, dataclasses.replace(BASE, dtype=Dtype.FP32), HERE) == ()


def test_the_best_configs_are_tried_first(sqlite: Database) -> None:
    near = dataclasses.replace(BASE, batch=2)
    keep(sqlite, near, HERE, {1: 0.9, 2: 0.5, 3: None, 4: 0.7, 5: 0.8})
    found = nearest(sqlite, BASE, HERE)
    first, neighbours = of_kernel(found, "b", "forward", "k")
    assert first == [config(2), config(4)][:FIRST]
    assert dict(neighbours[0].found) == {config(b): math.log(r) for b, r in {1: 0.9, 2: 0.5, 4: 0.7, 5: 0.8}.items()}
    assert of_kernel(found, "b", "forward", "another") == ([], [])
    assert of_kernel(found, "b", "dq", "k") == ([], [])
