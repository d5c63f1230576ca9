"""Real finals of an H200 as answers of a database: what is kept, what is left alone, what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tilewise.bench import core_report
from tilewise.bench.core_answers import answer_of
from tilewise.bench.core_import import import_report, judgeable
from tilewise.bench.core_report import Report
from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate
from tilewise.domain.errors import SettingsError
from tilewise.domain.problem import Problem

FILE = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200_core.json"
H200 = "nvidia-h200.sm90.141g.700w"


@pytest.fixture(scope="module")
def report() -> Report:
    """Some rows of the real one: one that torch's choice keeps, one that ours wins, one with a stand-in, decoding."""
    whole = judgeable(FILE)
    chosen = (
        "inference.fp16.b2.h128.kv128.q2048.k2048.d56.causal",
        "inference.fp16.b1.h64.kv8.q4096.k4096.d128",
        "training.fp16.b2.h16.kv16.q4096.k4096.d128.causal.alibi",
        "inference.fp16.b32.h64.kv8.q1.k8192.d128",
    )
    return replace(whole, rows=tuple(row for key in chosen for row in whole.rows if row.problem.key == key))


def kept(database: Database) -> dict[str, Answer]:
    with database.read() as session:
        return AnswerRepository(session).of_device(H200)


def everything(database: Database) -> tuple[Any, ...]:
    with database.read() as session:
        answers = AnswerRepository(session)
        found = answers.of_device(H200)
        trials = TrialRepository(session)
        return answers.newest(), found, [trials.list(Problem.parse(key), H200) for key in found]


def standing(database: Database, answer: Answer) -> None:
    with database.write() as session:
        assert AnswerRepository(session).replace(answer, expected_version=0, reason="a test")


def test_devices_trials_and_answers_are_kept(database: Database, report: Report) -> None:
    found = import_report(report, database)
    assert (found.device_key, found.rows, found.answers, found.left) == (H200, 4, 4, ())
    assert found.trials == sum(len(row.trials) for row in report.rows)
    with database.read() as session:
        assert DeviceRepository(session).get(H200) == report.device
        for row in report.rows:
            trials = TrialRepository(session).list(row.problem, H200)
            assert trials == tuple(replace(trial, job=None) for trial in row.trials)
            assert TrialRepository(session).finished(row.problem, H200, row.run.software)
    answers = kept(database)
    winners = [answers[row.problem.key].plan.forward.backend for row in report.rows]
    assert winners == ["sdpa", "triton", "triton", "triton_decode"]
    for row in report.rows:
        evidence = answers[row.problem.key].evidence
        assert evidence is not None
        assert {each.candidate for each in evidence.finalists} == {entry.candidate for entry in row.entries}
        assert all(each.candidate.configs for each in evidence.finalists if each.default)
        assert evidence.measured == max(trial.when for trial in row.trials)
        assert evidence.reason.endswith("a final of `tilewise bench core`")
        assert answers[row.problem.key].software == row.run.software
    assert "torch's own choice, sdpa, stays" in str(answers[report.rows[0].problem.key].evidence)
    assert "torch's own choice, which is wrong here, sdpa_math" in str(answers[report.rows[2].problem.key].evidence)
    # decoding is measured against a path of torch's; the speed-up is over its own choice all the same
    decoding = report.rows[3]
    sdpa = decoding.best("sdpa")
    assert sdpa is not None
    assert answers[decoding.problem.key].baseline_ms == sdpa.measurement.median_ms


def test_a_second_import_changes_nothing(database: Database, report: Report) -> None:
    import_report(report, database)
    before = everything(database)
    again = import_report(report, database)
    assert (again.trials, again.answers) == (0, 0)
    assert {left.reason for left in again.left} == {"this final is kept already"}
    assert everything(database) == before


def test_the_whole_file_can_be_imported(sqlite: Database) -> None:
    whole = judgeable(FILE)
    found = import_report(whole, sqlite)
    assert found.answers == len(whole.rows) == len(kept(sqlite))
    assert sqlite.file is not None
    assert sqlite.file.with_name("tilewise.snapshot.json").exists()


def test_a_newer_answer_is_left_alone(sqlite: Database, report: Report) -> None:
    row = report.rows[1]
    newer = answer_of(row)
    assert newer.evidence is not None
    later = newer.evidence.measured + timedelta(minutes=1)
    standing(sqlite, replace(newer, evidence=replace(newer.evidence, measured=later)))
    before = kept(sqlite)[row.problem.key]
    (left,) = import_report(report, sqlite).left
    assert left.problem == row.problem
    assert left.reason.startswith("the standing answer was measured later, 2026-")
    assert kept(sqlite)[row.problem.key] == before


def test_an_older_answer_has_to_be_beaten_in_the_final(sqlite: Database, report: Report) -> None:
    row = report.rows[1]
    answer = answer_of(row)
    assert answer.evidence is not None
    older = replace(answer.evidence, measured=answer.evidence.measured - timedelta(days=1))
    slow = row.entries[-1].candidate
    assert slow != answer.plan.forward
    standing(sqlite, replace(answer, plan=replace(answer.plan, forward=slow), evidence=older))
    assert import_report(report, sqlite).left == ()
    now = kept(sqlite)[row.problem.key]
    assert (now.version, now.plan) == (2, answer.plan)
    assert "beats the standing answer" in str(now.evidence)
    with sqlite.read() as session:
        changes = AnswerRepository(session).history(H200, row.problem)
    assert changes[0].reason.startswith("imported: ")


def test_an_answer_that_the_final_did_not_hold_stays(sqlite: Database, report: Report) -> None:
    row = report.rows[1]
    answer = answer_of(row)
    assert answer.evidence is not None
    older = replace(answer.evidence, measured=answer.evidence.measured - timedelta(days=1), finalists=())
    standing(sqlite, replace(answer, plan=replace(answer.plan, forward=Candidate("plain")), evidence=older))
    (left,) = import_report(report, sqlite).left
    assert left.reason == "its final did not hold the standing answer, plain"
    assert kept(sqlite)[row.problem.key].plan.forward == Candidate("plain")


def test_later_finals_of_a_report_come_in(sqlite: Database, report: Report) -> None:
    import_report(report, sqlite)
    row = report.rows[0]
    moved = tuple(replace(trial, when=trial.when + timedelta(hours=1)) for trial in row.trials)
    found = import_report(report.with_row(replace(row, trials=moved)), sqlite)
    assert (found.trials, found.answers, len(found.left)) == (len(moved), 1, 3)
    assert kept(sqlite)[row.problem.key].version == 2


def _edit(change: Callable[[Any], object]) -> str:
    document = json.loads(FILE.read_text())
    document["rows"] = document["rows"][:2]
    change(document)
    return json.dumps(document)


A100 = {"kind": "cuda", "name": "NVIDIA A100", "arch": "sm_80", "units": 108, "memory_gib": 80}
BAD = {
    "no json": ("not json", "is no report"),
    "another document": ('{"answers": []}', "is no report"),
    "deep": ("[" * 100_000, "is no report"),
    "no rows": (_edit(lambda d: d["rows"].clear()), "it holds no row"),
    "another key": (_edit(lambda d: d.update(device_key="nvidia-a100.sm80.80g")), "is said to be of nvidia-a100"),
    "another card": (_edit(lambda d: d["rows"][1]["run"].update(device=A100)), "is said to be of nvidia-a100"),
    "a row of another": (
        _edit(lambda d: d["rows"][1]["run"].update(device=A100, device_key="nvidia-a100.sm80.80g")),
        "is said to be of nvidia-a100",
    ),
    "twice": (_edit(lambda d: d["rows"].append(d["rows"][0])), "is there twice"),
    "no reference": (
        _edit(lambda d: d["rows"][0].update(reference={"backend": "plain", "configs": {}})),
        "needs its reference plain",
    ),
    "no ratio": (_edit(lambda d: d["rows"][0]["entries"][0]["measurement"].update(ratio=None)), "not above 0"),
    "NaN": (_edit(lambda d: d["rows"][0]["entries"][0]["measurement"].update(median_ms=float("nan"))), "not above 0"),
    "noise": (_edit(lambda d: d["rows"][0].update(noise=-0.1)), "no noise between 0 and 1"),
    "no zone": (_edit(lambda d: d["rows"][0]["run"].update(started="2026-11-28T12:00:00")), "a time without its zone"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_judgeable_report_is_refused(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message) as error:
        judgeable(path)
    assert "\n" not in str(error.value)


def test_the_real_report_is_judgeable() -> None:
    assert core_report.read(FILE).rows == judgeable(FILE).rows
