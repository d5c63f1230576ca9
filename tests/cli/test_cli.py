"""The command line as a person sees it: whole output, exit codes, and one clear line for everything that is wrong."""

import compileall
import contextlib
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tilewise.cli import main as cli
from tilewise.cli.commands import doctor
from tilewise.cli.progress import watching
from tilewise.db.session import Database
from tilewise.domain import codec
from tilewise.domain.answer import Answer, Match
from tilewise.domain.problem import Problem
from tilewise.tuner.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
KEY = "inference.fp32.b1.h2.kv2.q64.k64.d16.causal.window16"


class Cli:
    """Runs commands in this process; `code`, `out` and `err` are those of the last one."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> int:
        self._monkeypatch.setattr(sys, "argv", ["tilewise", *arguments])
        self._capsys.readouterr()
        try:
            cli.main()
            self.code = 0
        except SystemExit as stop:
            self.code = int(stop.code or 0)
        self.out, self.err = self._capsys.readouterr()
        return self.code


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


def written(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*")) if home.exists() else []


def test_tune_show_answer(run: Cli, home: Path) -> None:
    assert run("tune", "--problem", KEY, "--device", "cpu", "--trials", "5", "--seconds", "20") == 0
    assert f"{KEY}: " in run.out
    assert re.search(r"  trials: .*\b5 ok\b", run.out)
    assert re.search(
        r"  seconds: [\d.]+ to start, [\d.]+ to prepare, [\d.]+ to search .*, [\d.]+ for the final\n", run.out
    )
    assert "5/5 trials" in run.err
    assert re.search(r"5/5 trials, best \S+ .*, done\n", run.err)
    assert written(home)[-1] == "tilewise.snapshot.json"

    assert run("show") == 0
    assert run.out.startswith("1 of 1 tuned problems\n")
    assert KEY in run.out
    assert run("show", "nothing-like-it") == 0
    assert run.err == "nothing matches 'nothing-like-it'\n"

    assert run("answer", KEY, "--device", "cpu", "--json") == 0
    answer = codec.from_json(Answer, json.loads(run.out))
    assert (answer.match, answer.problem.key, answer.version) == (Match.EXACT, KEY, 1)
    assert answer.evidence is not None
    assert answer.evidence.trials == 5
    assert {str(finalist.candidate) for finalist in answer.evidence.finalists} >= {"sdpa"}

    snapshot = str(home / "tilewise.snapshot.json")
    assert run("answer", KEY, "--device", "cpu", "--source", snapshot, "--json") == 0
    assert codec.from_json(Answer, json.loads(run.out)) == answer
    assert run("answer", KEY, "--device", answer.device_key) == 0
    assert "match      exact\n" in run.out
    assert f"run        {answer.plan}\n" in run.out


def test_tune_json_is_one_document(run: Cli) -> None:
    assert run("tune", "--problem", KEY, "--device", "cpu", "--trials", "3", "--seconds", "60", "--json") == 0
    document = json.loads(run.out)
    assert set(document) == {"answers", "budget", "device", "device_key", "outcomes", "seconds", "software", "spent"}
    (spent,), (outcomes,) = document["spent"], document["outcomes"]
    assert min(spent["start"], spent["prepare"], spent["search"], spent["final"], spent["measure"]) > 0
    parts = spent["start"] + spent["prepare"] + spent["search"] + spent["final"]
    assert parts < document["seconds"] < parts + 2
    assert outcomes["ok"] == 4, "the default of every backend is tried that compiles in time"
    assert [item["problem"] for item in document["answers"]] == [KEY]


def test_a_picture_of_the_search(run: Cli, tmp_path: Path) -> None:
    path = tmp_path / "search.png"
    assert run("tune", "--problem", KEY, "--device", "cpu", "--trials", "4", "--plot", str(path)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert run("tune", "--problem", KEY, "--device", "cpu", "--plot", str(tmp_path / "absent" / "search.png")) == 2
    assert "expected a .png, .svg or .pdf file in a folder that exists" in run.err


def test_one_candidate_is_tried_and_nothing_kept(run: Cli, home: Path) -> None:
    tiled = {"kernel": "cpu_tiled", "values": {"block_q": 32, "block_k": 32, "heads_per_chunk": 1}}
    candidate = json.dumps({"backend": "cpu_tiled", "configs": {"forward": tiled}})
    assert run("try", KEY, "--candidate", candidate, "--device", "cpu", "--rounds", "5", "--json") == 0
    found = json.loads(run.out)
    assert found["trial"]["outcome"] == "ok"
    assert [each["backend"] for each in found["finalists"]] == ["sdpa", "cpu_tiled"]
    assert found["final"]["measurements"][0]["ratio"] == 1
    assert found["final"]["measurements"][1]["samples"] >= 5
    assert written(home) == []


def test_a_candidate_that_is_not_right_is_said_to_be(run: Cli) -> None:
    assert run("try", KEY, "--candidate", '{"backend": "flash"}', "--device", "cpu") == 1
    assert run.out == "unsupported  flash: needs a CUDA device\n"
    odd = {"backend": "cpu_tiled", "configs": {"forward": {"kernel": "cpu_tiled", "values": {"block_q": 32}}}}
    assert run("try", KEY, "--candidate", json.dumps(odd), "--device", "cpu") == 1
    assert run.out.startswith("failed  cpu_tiled(block_q=32): ")
    for text, says in (('{"backend"', "--candidate: "), ('{"backend": "none"}', "unknown backend 'none'")):
        assert run("try", KEY, "--candidate", text, "--device", "cpu") == 2
        assert says in run.err


def test_a_training_step_with_dropout_is_tuned(run: Cli) -> None:
    key = "training.fp32.b1.h2.kv2.q128.k128.d32.causal.dropout"
    assert run("tune", "--problem", key, "--device", "cpu", "--trials", "3", "--seconds", "20", "--json") == 0
    (answer,) = (codec.from_json(Answer, item) for item in json.loads(run.out)["answers"])
    assert answer.evidence is not None
    assert (answer.problem.key, answer.evidence.trials, answer.evidence.failed) == (key, 3, 0)
    assert run("answer", key, "--device", "cpu") == 0
    assert "match      exact\n" in run.out


def test_an_answer_that_nobody_measured_says_what_to_do(run: Cli) -> None:
    assert run("db", "upgrade") == 0
    assert run("answer", KEY, "--device", "cpu") == 0
    assert "match      default, problem: " in run.out
    assert f"next       tilewise tune --problem {KEY}\n" in run.out


def test_doctor_says_which_packages_every_process_compiles_again(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "slow_one"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "IMPORTED", ("slow_one", "absent_one"))
    assert run("doctor", "--device", "cpu") == 0
    assert f"python -m compileall -q {package}\n" in run.out
    assert compileall.compile_dir(package, quiet=1)
    assert run("doctor", "--device", "cpu") == 0
    assert "compileall" not in run.out


def test_doctor_says_why_a_backend_is_absent(run: Cli) -> None:
    assert run("doctor", "--device", "cpu") == 0
    assert re.search(r"triton +no +needs a CUDA device", run.out)
    assert re.search(r"cpu_tiled +yes", run.out)
    assert re.search(r"flash_cute +no +needs a CUDA device", run.out)
    assert run("doctor", "--device", "cpu", "--json") == 0
    report = json.loads(run.out)
    assert {item["name"]: item["reason"] for item in report["backends"]}["sdpa"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["tune", "--problem", "nonsense"], 2, r"not a problem key: 'nonsense'; expected PASS\.DTYPE\."),
        (
            ["tune", "--problem", "inference.fp16.b1.h6.kv4.q64.k64.d64"],
            2,
            r"heads must be a multiple of kv_heads, got heads=6 and kv_heads=4; use a kv_heads that divides heads",
        ),
        (["tune", "--model", "gpt9"], 2, r"unknown model 'gpt9'; expected one of deepseek_v3, "),
        (["tune"], 2, r"nothing to tune: give --model NAME or --problem KEY"),
        (["tune", "--model", "llama3_70b", "--dtype", "fp64"], 2, r"--dtype: expected one of fp16, bf16, fp32"),
        (["tune", "--problem", KEY, "--backends", "sdpa,magic"], 2, r"unknown backend 'magic'; expected one of sdpa"),
        (
            ["landscape", "replay", "absent.jsonl.gz"],
            2,
            r"absent\.jsonl\.gz is no landscape .*; record one with `tilewise",
        ),
        (
            ["landscape", "record", "--problem", KEY, "--backend", "triton", "--device", "cpu"],
            2,
            r"triton cannot compute \S+ here: needs a CUDA device",
        ),
        (["tune", "--problem", KEY, "--device", "cuda:99"], 1, r"no device 'cuda:99' on this machine: expected auto"),
        (["answer", "nonsense"], 2, r"not a problem key"),
        (["answer", KEY, "--device", "cpu"], 1, r"there is no database at .*; create it: `tilewise db upgrade"),
        (["show"], 1, r"there is no database at "),
        (["tune", "--problem", KEY, "--db", "mysql://x"], 1, r"postgresql"),
    ],
)
def test_bad_input_is_one_clear_line_and_writes_nothing(
    run: Cli, home: Path, arguments: list[str], code: int, says: str
) -> None:
    assert run(*arguments) == code
    assert re.search(says, run.err)
    assert run.err.startswith("tilewise: ")
    assert run.err.count("\n") == 1
    assert run.out == ""
    assert [name for name in written(home) if name.endswith(".json")] == []
    if code == 2:
        assert [name for name in written(home) if "wal" not in name] in ([], ["tilewise.db"])


def test_a_data_folder_that_cannot_be_written(run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TILEWISE_HOME", str(tmp_path / "file" / "home"))
    assert run("tune", "--problem", KEY, "--device", "cpu") == 1
    assert re.fullmatch(r"tilewise: cannot make the data folder .*; name a database with --db, or .*\n", run.err)


def test_a_database_that_is_newer_than_the_code(run: Cli, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    Database.open(url, upgrade=True).close()
    with sqlite3.connect(tmp_path / "new.db") as connection:
        connection.execute("UPDATE tilewise_version SET version_num = 'from_the_future'")
    connection.close()
    before = (tmp_path / "new.db").read_bytes()
    for command in (["tune", "--problem", KEY, "--device", "cpu"], ["show"], ["serve"]):
        assert run(*command, "--db", url) == 1
        assert "newer" in run.err
        assert "upgrade tilewise" in run.err
        assert run.err.count("\n") == 1
    assert (tmp_path / "new.db").read_bytes() == before


def test_a_port_in_use(run: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        loggers = [*logging.getLogger("tilewise").handlers]
        assert run("serve", "--port", port) == 2
        assert logging.getLogger("tilewise").handlers == loggers, "who serves nothing leaves them alone"
    assert run.err.startswith(f"tilewise: cannot serve on 127.0.0.1 port {port}: ")
    assert run.err.count("\n") == 1


def _as_from_a_terminal() -> None:
    """However the tests were started, behind a shell's & for instance."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def test_ctrl_c_keeps_finished_trials_and_the_same_command_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'tilewise.db'}"
    problem = "inference.fp32.b1.h4.kv4.q512.k512.d32.causal.window64"
    command = [sys.executable, "-m", "tilewise.cli.main", "tune", "--problem", problem, "--device", "cpu"]
    command += ["--trials", "400", "--seconds", "250", "--backends", "cpu_tiled", "--db", url]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=_as_from_a_terminal
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:  # the first line with a best candidate: a trial was kept
            if "best " in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 1, rest
    said = re.search(r"interrupted: (\d+) finished trials of \S+ are kept in \S+; the same command goes on", rest)
    assert said is not None, rest
    with sqlite3.connect(tmp_path / "tilewise.db") as connection:
        candidates = connection.execute("SELECT candidate_digest FROM trials WHERE outcome != 'unsupported'").fetchall()
        assert connection.execute("SELECT state FROM jobs").fetchall() == [("cancelled",)]
    assert len(candidates) == len(set(candidates)) == int(said[1])

    kept = len(candidates)
    again = [*command, "--trials", str(kept + 6)]
    done = subprocess.run(again, capture_output=True, text=True, env=environment, check=True)
    assert problem in done.stdout
    with sqlite3.connect(tmp_path / "tilewise.db") as connection:
        candidates = connection.execute("SELECT candidate_digest FROM trials WHERE outcome != 'unsupported'").fetchall()
    connection.close()
    assert len(candidates) == len(set(candidates)) == kept + 6


def test_a_ctrl_c_that_was_swallowed_is_raised_with_the_next_trial() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with watching("one") as report:
            report(Progress(phase="search", trials=1, failed=0, total=9, seconds_left=9.0))
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                report(Progress(phase="search", trials=2, failed=0, total=9, seconds_left=8.0))
            assert report.trials == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with watching("two"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    names = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]
    assert len(names) >= 5
    assert [name for name in names if f"tilewise {name}" not in readme] == []


def test_the_key_of_these_tests_is_canonical() -> None:
    assert Problem.parse(KEY).key == KEY
