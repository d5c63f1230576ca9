"""Jobs, workers, snapshots, channels, tokens and serving, from the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.test_cli import KEY, Cli, run  # noqa: F401 - a fixture
from tests.domain.examples import DEVICE, PROBLEM, answer

from tilewise.client import paths
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Match
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.usage import Usage, Use

OTHER = Problem(batch=2, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)


@pytest.fixture
def opened(home: Path) -> Database:
    home.mkdir()
    return Database.open(paths.default_database_url(), upgrade=True)


def put(database: Database, problem: Problem = PROBLEM) -> None:
    with database.write() as session:
        AnswerRepository(session).replace(answer(problem), expected_version=0, reason="test")


def test_a_job_is_submitted_run_by_a_worker_and_watched(
    run: Cli,  # noqa: F811
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process: the threads are part of a CPU's key
    assert run("jobs", "submit", "--problem", KEY, "--device", "cpu", "--budget", "quick", "--trials", "3") == 0
    job_id = run.out.split()[0]
    assert run("jobs", "list") == 0
    assert re.search(rf"{job_id} +queued +0% +{re.escape(KEY)}", run.out)
    assert run("worker", "--device", "cpu", "--jobs", "1") == 0  # a child process runs it
    assert run("jobs", "watch", job_id) == 0
    assert run.out.splitlines()[0].split()[1] == "queued"
    assert run.out.splitlines()[-1].split()[1:3] == ["succeeded", "100%"]
    assert run("jobs", "show", job_id, "--json") == 0
    shown = json.loads(run.out)
    assert (shown["job"]["job"]["state"], shown["job"]["attempt"]) == ("succeeded", 1)
    assert run("answer", KEY, "--device", "cpu", "--json") == 0
    assert json.loads(run.out)["evidence"]["job"] == job_id
    assert (home / "tilewise.snapshot.json").exists()


def test_a_job_is_cancelled_once(run: Cli) -> None:  # noqa: F811
    assert run("jobs", "submit", "--problem", KEY, "--device", DEVICE, "--json") == 0
    job_id = json.loads(run.out)["jobs"][0]["id"]
    assert run("jobs", "cancel", job_id) == 0
    assert run("jobs", "cancel", job_id) == 1
    assert run.err == f"tilewise: job {job_id} has ended already; there is nothing to cancel\n"
    assert run("jobs", "watch", job_id) == 1
    assert run("jobs", "show", "nonsense") == 1
    assert run.err.startswith("tilewise: no job 'nonsense'; `tilewise jobs list`")
    assert run("jobs", "list", "--state", "lost") == 2
    assert run("jobs", "submit", "--problem", KEY, "--budget", "huge") == 2


def test_what_clients_missed_becomes_jobs(run: Cli, opened: Database) -> None:  # noqa: F811
    put(opened)
    uses = (Use(problem=OTHER, match=Match.DEFAULT, calls=5000), Use(problem=PROBLEM, match=Match.EXACT, calls=1))
    with opened.write() as session:
        DemandRepository(session).add(Usage(device_key=DEVICE, snapshot=None, uses=uses))
    assert run("jobs", "propose") == 0
    assert OTHER.key in run.out
    assert PROBLEM.key not in run.out
    assert run("jobs", "propose", "--submit", "--json") == 0
    (found,) = json.loads(run.out)["proposals"]
    assert (found["demand"]["problem"], found["demand"]["missed"]) == (OTHER.key, 5000)
    assert found["lost_ms"] > 0
    assert run("jobs", "list", "--state", "queued", "--json") == 0
    assert [one["job"]["problem"] for one in json.loads(run.out)["jobs"]] == [OTHER.key]
    assert run("jobs", "propose") == 0  # it waits already
    assert run.err == "no client reported a problem that waits for a tuning\n"


def test_snapshots_are_exported_signed_compared_and_pointed_at(
    run: Cli,  # noqa: F811
    opened: Database,
    tmp_path: Path,
) -> None:
    put(opened)
    first, second, key = tmp_path / "1.json", tmp_path / "2.json", tmp_path / "key"
    assert run("snapshot", "export", str(first), "--note", "one") == 0
    one = Snapshot.loads(first.read_bytes())
    assert run.out == f"{one.id}  1 answers: {first}\n"
    put(opened, OTHER)
    assert run("snapshot", "keygen", str(key)) == 0
    assert key.stat().st_mode & 0o777 == 0o600
    assert run("snapshot", "keygen", str(key)) == 2
    assert run("snapshot", "export", str(second), "--sign-with", str(key)) == 0
    two = Snapshot.loads(second.read_bytes())
    assert two.signature is not None
    assert run("snapshot", "diff", str(first), two.id, "--json") == 0
    (found,) = json.loads(run.out)["differences"]
    assert (found["problem"], found["before"]) == (OTHER.key, None)
    for each in (one, two):
        assert run("snapshot", "point", "stable", each.id, "--reason", "tested") == 0
    assert run("snapshot", "rollback", "stable") == 0
    assert run.out == f"stable -> {one.id}\n"
    assert run("snapshot", "list", "--json") == 0
    listed = json.loads(run.out)
    assert listed["channels"] == {"stable": one.id}
    assert {each["id"] for each in listed["snapshots"]} == {one.id, two.id}
    assert run("snapshot", "show", "stable") == 0
    assert PROBLEM.key in run.out
    assert run.out.count("tested") == 2
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert run("db", "upgrade", "--db", other) == 0
    assert run("snapshot", "import", str(second), "--db", other) == 0
    assert run("snapshot", "export", str(tmp_path / "3.json"), "--of", two.id, "--db", other) == 0
    assert (tmp_path / "3.json").read_bytes() == second.read_bytes()
    assert run("snapshot", "show", "nothing") == 1
    assert run("snapshot", "import", str(tmp_path / "missing")) == 1


def test_tokens_are_made_listed_and_revoked(run: Cli, opened: Database) -> None:  # noqa: F811
    opened.close()
    assert run("tokens", "create", "ci", "--scope", "read", "--scope", "tune", "--days", "30") == 0
    token = run.out.strip()
    assert token.startswith("tw_")
    assert run("tokens", "list") == 0
    assert token not in run.out
    token_id = token.split("_")[1]
    assert re.search(rf"{token_id} +ci +read, tune", run.out)
    assert run("tokens", "revoke", token_id) == 0
    assert run("tokens", "list", "--json") == 0
    assert json.loads(run.out)["tokens"][0]["revoked"] is not None
    assert run("tokens", "revoke", "0123") == 1
    assert run("tokens", "create", "ci", "--scope", "everything") == 2


def test_the_service_does_not_listen_elsewhere_without_a_token(run: Cli) -> None:  # noqa: F811
    for host in ("0.0.0.0", "::"):
        assert run("serve", "--host", host, "--port", "0") == 2
        assert run.err.startswith(f"tilewise: host '{host}' can be reached from other machines, and without a token")
    assert run.err.count("\n") == 1


def test_a_worker_needs_no_torch_for_its_help(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    code = "import sys; from tilewise.cli.main import app; assert 'torch' not in sys.modules"
    environment = {"PYTHONPATH": str(root / "src"), "HOME": str(tmp_path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_core_benchmark_is_imported(run: Cli, tmp_path: Path) -> None:  # noqa: F811
    report = Path(__file__).resolve().parents[2] / "bench" / "results" / "h200_core.json"
    url = f"sqlite:///{tmp_path / 'new.db'}"
    assert run("db", "import", str(report), "--db", url) == 0
    assert re.fullmatch(r"nvidia-h200\.sm90\.141g\.700w: 40 rows, \d+ new trials, 40 new answers\n", run.out)
    assert run("db", "import", str(report), "--db", url, "--json") == 0
    assert json.loads(run.out)["answers"] == 0
    assert run("db", "import", str(report), "--db", url) == 0
    assert "this final is kept already" in run.out


def test_a_bad_core_benchmark_makes_no_database(run: Cli, tmp_path: Path) -> None:  # noqa: F811
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    assert run("db", "import", str(bad), "--db", f"sqlite:///{tmp_path / 'new.db'}") == 2
    assert run.err.startswith(f"tilewise: {bad} is no report of `tilewise bench core`")
    assert run.err.count("\n") == 1
    assert not (tmp_path / "new.db").exists()


def test_an_answer_of_another_device_says_so(run: Cli, opened: Database, tmp_path: Path) -> None:  # noqa: F811
    put(opened)
    never = DEVICE.replace("avx512", "avx2")
    assert run("snapshot", "export", str(tmp_path / "all.json")) == 0
    for source in ([], ["--source", str(tmp_path / "all.json")]):
        assert run("answer", PROBLEM.key, "--device", never, *source) == 0
        assert f"match      predicted, device: {PROBLEM.key} was not measured on {never}" in run.out
        assert f"measured   {PROBLEM.key} on {DEVICE}\n" in run.out
        assert re.search(r"regret     at most \d+% slower than the best plan, 9 times in 10\n", run.out)
    assert run("answer", PROBLEM.key, "--device", never, "--json") == 0
    assert json.loads(run.out)["measured_on"] == DEVICE
