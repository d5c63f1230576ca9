"""Codec, snapshots, spaces, software and the match rule."""

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewise.domain import codec
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import Device, DeviceKind, check_device_key
from tilewise.domain.errors import ConfigError, DeviceError, SnapshotError
from tilewise.domain.matching import match
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot, file_of
from tilewise.domain.software import Software
from tilewise.domain.space import Constraint, Parameter, SearchSpace
from tilewise.domain.trial import NumericError, Outcome, Stage, Trial

from .examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

values = st.one_of(
    st.booleans(), st.integers(-(2**31), 2**31), st.floats(allow_nan=False, allow_infinity=False), st.text()
)


def test_an_answer_survives_json() -> None:
    one = answer()
    assert codec.from_json(Answer, json.loads(codec.canonical(one))) == one


def test_equal_values_have_equal_bytes_whether_a_float_was_written_as_int() -> None:
    one, other = measurement(10), measurement(10.0)
    assert codec.canonical(one) == codec.canonical(other)
    assert Snapshot.loads(Snapshot.of([answer()]).dumps()).id == Snapshot.of([answer()]).id


def test_a_trial_survives_json() -> None:
    trial = Trial(
        candidate=TILED,
        stage=Stage.FORWARD,
        outcome=Outcome.WRONG_RESULT,
        measurement=measurement(1.0),
        error=NumericError(worst=3.5, tensor="out", case="masked"),
        message="out: 3.5 times the bound",
    )
    assert codec.from_json(Trial, json.loads(codec.canonical(trial))) == trial


@given(st.dictionaries(st.text(min_size=1), values))
def test_a_config_survives_json_with_its_types(pairs: dict[str, bool | int | float | str]) -> None:
    config = (
        Config.of("k", **pairs) if all(name.isidentifier() for name in pairs) else Config("k", tuple(pairs.items()))
    )
    back = codec.from_json(Config, json.loads(codec.canonical(config)))
    assert back == config
    assert [type(value) for _, value in back.values] == [type(value) for _, value in config.values]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("plan", None),
        ("expected_ms", "fast"),
        ("match", "perfect"),
        ("problem", "x"),
        ("interval", [1]),
        ("version", True),
    ],
)
def test_a_document_that_does_not_fit_is_refused(path: str, value: object) -> None:
    document = codec.to_json(answer())
    document[path] = value
    with pytest.raises(ValueError, match=path):
        codec.from_json(Answer, document)


def test_a_field_from_the_future_is_ignored() -> None:
    document = codec.to_json(answer())
    document["confidence"] = {"new": 1}
    assert codec.from_json(Answer, document) == answer()


def test_a_snapshot_is_its_content() -> None:
    other = answer(dataclasses.replace(PROBLEM, batch=2))
    one, two = Snapshot.of([answer(), other]), Snapshot.of([other, answer()])
    assert one.id == two.id
    assert Snapshot.loads(one.dumps()).answers == one.answers
    assert Snapshot.of([answer()]).id != one.id


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[: len(data) // 2], "not a tilewise snapshot"),
        (lambda _: b"[]", "not a tilewise snapshot"),
        (lambda data: data.replace(b'"expected_ms":10.0', b'"expected_ms":9.0'), "damaged"),
        (lambda data: data.replace(b'"schema":1', b'"schema":99'), "schema 99"),
        (lambda data: data.replace(b'"expected_ms":10.0', b'"expected_ms":NaN'), "not a tilewise snapshot"),
        (lambda data: data.replace(b"fastest", b"\\ud800"), "not a tilewise snapshot"),
        (lambda _: b"[" * 100_000, "not a tilewise snapshot"),
        (lambda data: resigned(data.replace(b'"expected_ms":10.0', b'"expected_ms":1' + b"0" * 400)), "too large"),
    ],
)
def test_a_damaged_snapshot_is_refused(damage: Callable[[bytes], bytes], says: str) -> None:
    data = Snapshot.of([answer()]).dumps()
    with pytest.raises(SnapshotError, match=says):
        Snapshot.loads(damage(data))


def resigned(data: bytes) -> bytes:
    """Return the snapshot file `data` with the id that its content has."""
    document = json.loads(data)
    del document["id"]
    return json.dumps({"id": codec.digest(document), **document}).encode()


def test_a_snapshot_keeps_the_id_that_its_writer_gave_it() -> None:
    newer = resigned(Snapshot.of([answer()]).dumps().replace(b'"version":1', b'"version":1,"colour":"red"'))
    read = Snapshot.loads(newer)
    assert read.answers == (answer(),)
    assert read.id == json.loads(newer)["id"] != Snapshot.of([answer()]).id
    assert read.dumps() == newer


def test_match_exact_for_the_problem_and_for_its_bucket() -> None:
    kept = {PROBLEM.key: answer()}
    assert match(PROBLEM, DEVICE, SOFTWARE, kept).match is Match.EXACT
    inside = dataclasses.replace(PROBLEM, q_len=2000, kv_len=2000)
    found = match(inside, DEVICE, SOFTWARE, kept)
    assert (found.match, found.problem, found.measured) == (Match.EXACT, inside, PROBLEM)


def test_match_stale_names_the_version_that_changed() -> None:
    newer = dataclasses.replace(SOFTWARE, torch="2.14.0")
    found = match(PROBLEM, DEVICE, newer, {PROBLEM.key: answer()})
    assert found.match is Match.STALE
    assert found.missed == "software: torch 2.13.0 -> 2.14.0"
    assert found.plan == answer().plan


def test_a_change_of_software_that_the_plan_does_not_use_voids_nothing() -> None:
    elsewhere = dataclasses.replace(SOFTWARE, triton="4.0", kernels=(("cpu_tiled", "0123456789ab"), ("sdpa", "f")))
    assert match(PROBLEM, DEVICE, elsewhere, {PROBLEM.key: answer()}).match is Match.EXACT


def test_an_exact_bucket_beats_a_stale_problem() -> None:
    inside = dataclasses.replace(PROBLEM, q_len=2000, kv_len=2000)
    old = answer(inside, software=dataclasses.replace(SOFTWARE, torch="2.0"))
    found = match(inside, DEVICE, SOFTWARE, {inside.key: old, PROBLEM.key: answer()})
    assert (found.match, found.measured) == (Match.EXACT, PROBLEM)


def test_nothing_known_gives_torch_s_own_choice() -> None:
    found = match(PROBLEM, DEVICE, SOFTWARE, {})
    assert (found.match, found.plan) == (Match.DEFAULT, Plan(SDPA))
    assert PROBLEM.key in found.missed
    assert match(dataclasses.replace(PROBLEM, softcap=True), DEVICE, SOFTWARE, {}).plan == Plan(Candidate("plain"))


def test_software_keys_round_trip() -> None:
    software = Software(torch="2.13.0+cpu", cuda="13.0", kernels=(("triton_forward", "abc"), ("cpu_tiled", "def")))
    assert Software.parse(software.key) == software
    assert software.for_backend("triton").kernels == (("triton_forward", "abc"),)
    assert software.for_backend("unknown") == software


def test_an_answer_depends_on_the_kernels_of_its_configs_alone() -> None:
    names = ("triton_forward", "triton_backward", "hopper_forward", "hopper_backward", "sdpa")
    software = Software(torch="2.13.0", triton="3.7", kernels=tuple((name, "1") for name in names))

    def kernels(*candidates: Candidate) -> set[str]:
        return set(dict(software.for_candidates(*candidates).kernels))

    tiled = Candidate.of("triton", forward=Config.of("triton_forward"))
    assert kernels(tiled) == {"triton_forward"}
    assert kernels(Candidate.of("triton", forward=Config.of("hopper_forward"))) == {"hopper_forward"}
    assert kernels(tiled.with_config("dq", Config.of("hopper_dq"))) == {
        "triton_forward", "hopper_backward", "triton_backward",
    }  # fmt: skip
    assert kernels(tiled, Candidate("sdpa")) == {"triton_forward", "sdpa"}
    assert kernels(Candidate("triton")) == set(names) - {"sdpa"}
    assert software.for_candidates(tiled).torch is None
    assert software.for_candidates(tiled, Candidate("unknown")) == software
    with pytest.raises(ValueError, match="name@version"):
        Software.parse("torch=2")


def space() -> SearchSpace:
    return SearchSpace(
        kernel="k",
        parameters=(Parameter("a", (1, 2, 4)), Parameter("b", (False, True), ordered=False)),
        default=Config.of("k", a=1, b=False),
        constraints=(Constraint("b needs a > 1", lambda v: not v["b"] or int(v["a"]) > 1),),
    )


def test_a_space_lists_what_it_contains() -> None:
    configs = list(space())
    assert len(configs) == 5
    assert all(config in space() for config in configs)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config.of("other", a=1, b=False), "not of 'k'"),
        (Config.of("k", a=3, b=False), "none of 1, 2, 4"),
        (Config.of("k", a=True, b=False), "a=True"),
        (Config.of("k", a=1), "parameters"),
        (Config.of("k", a=1, b=True), "b needs a > 1"),
    ],
)
def test_a_space_says_why_not(config: Config, says: str) -> None:
    assert says in (space().why_not(config) or "")


def test_a_default_outside_its_space_is_refused() -> None:
    with pytest.raises(ConfigError, match="outside its own space"):
        dataclasses.replace(space(), default=Config.of("k", a=9, b=False))


def test_device_keys() -> None:
    gpu = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, power_limit_w=700)
    assert (gpu.key, gpu.capability) == ("nvidia-h200.sm90.141g.700w", 90)
    slice_ = dataclasses.replace(gpu, name="NVIDIA A100-SXM4-80GB", arch="sm_80", memory_gib=40, mig="3g.40gb")
    assert slice_.key == "nvidia-a100-sxm4-80gb.sm80.40g.mig-3g-40gb.700w"
    cpu = Device(kind=DeviceKind.CPU, name="AMD EPYC 9B14", arch="x86_64.avx512", units=2, memory_gib=24)
    assert (cpu.key, cpu.capability) == (DEVICE, 0)
    for device in (gpu, slice_, cpu):
        assert check_device_key(device.key) == device.key
        assert codec.from_json(Device, codec.to_json(device)) == device
    with pytest.raises(DeviceError, match="tilewise doctor"):
        check_device_key("../etc/passwd")


def test_a_file_made_of_documents_is_that_of_the_snapshot() -> None:
    answers = [answer(), answer(Problem(batch=3, heads=8, q_len=128, head_dim=64)), answer(device_key="a.device")]
    made = Snapshot.of(answers)
    assert file_of(codec.to_json(one) for one in answers) == (made.id, made.dumps())
    assert file_of([]) == (Snapshot(()).id, Snapshot(()).dumps())
