"""The page of one problem, its charts, and the page of one trial."""

import dataclasses
import json
import shlex
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, TILED, answer, measurement

from tilewise.api.pages import commands
from tilewise.cli.commands import attempt, tune
from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.answer import Answer
from tilewise.domain.config import Candidate, Config, Plan
from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.job import BUDGETS, budget_named
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Outcome, Stage, Trial

from . import html
from .html import Page

PATH = f"/problems/{DEVICE}/{PROBLEM.key}"
EVIL = "<script>alert(1)</script>"


def tiled(block: int, chunk: int = 4) -> Candidate:
    values = {"block_q": block, "block_k": 128, "heads_per_chunk": chunk}
    return Candidate.of("cpu_tiled", forward=Config.of("cpu_tiled", **values))


def tried(candidate: Candidate, ratio: float | None = None, outcome: Outcome = Outcome.OK, message: str = "") -> Trial:
    times = measurement(30 * ratio, ratio) if ratio else None
    return Trial(candidate=candidate, stage=Stage.FORWARD, outcome=outcome, measurement=times, message=message)


TRIALS = (
    tried(SDPA, 1.0),
    tried(tiled(64), 0.5),
    tried(tiled(128), 1 / 3),
    tried(tiled(64, 8), 0.6),
    tried(tiled(256), outcome=Outcome.WRONG_RESULT, message=f"out is off by {EVIL}"),
    tried(Candidate("flex_cpu"), outcome=Outcome.UNSUPPORTED, message="takes no window here"),
)


def keep(database: Database, *trials: Trial, problem: Problem = PROBLEM, device: str = DEVICE) -> list[int]:
    with database.write() as session:
        return [
            TrialRepository(session).add(trial, problem=problem, device_key=device, software=SOFTWARE)
            for trial in trials
        ]


def put(database: Database, new: Answer, version: int = 0, reason: str = "fastest in the final") -> None:
    with database.write() as session:
        assert AnswerRepository(session).replace(new, expected_version=version, reason=reason)


@pytest.fixture
def tuned(sqlite: Database) -> Database:
    keep(sqlite, *TRIALS)
    put(sqlite, answer())
    return sqlite


def get(client: TestClient, path: str = PATH, **query: str | int) -> Page:
    return html.get(client, path, query)


def chart(client: TestClient, name: str, **query: str | int) -> Any:
    reply = client.get(f"{PATH}/charts/{name}", params=query)
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    return reply.json()


@pytest.mark.usefixtures("tuned")
def test_the_page_tells_what_won_and_why(client: TestClient) -> None:
    page = get(client)
    for words in ("cpu_tiled", "10.0 ms", "3.00\N{MULTIPLICATION SIGN}", "torch takes 30.0 ms", "fastest in the final"):
        assert words in page.text
    assert "exact" in page.text
    assert "Trials 6 2 not right; noise 1%" in page.text
    # a CPU has no peaks here, and the page says so
    assert "peaks of this device are not known" in page.text


@pytest.mark.usefixtures("tuned")
def test_backends_that_were_not_in_the_final_say_why(client: TestClient) -> None:
    text = get(client).text
    assert "unsupported: takes no window here" in text


def test_failures_are_counted_by_what_happened(client: TestClient, tuned: Database) -> None:
    keep(tuned, *(tried(tiled(32, n), outcome=Outcome.TIMED_OUT, message="took 60 s") for n in (1, 2, 3)))
    page = get(client)
    assert "3 timed out cpu_tiled took 60 s" in page.text
    assert "/trials/9" in page.links  # the newest of them


def test_what_others_wrote_is_escaped(client: TestClient, tuned: Database) -> None:
    keep(tuned, tried(Candidate.of(EVIL, forward=Config.of("k", **{EVIL: EVIL})), 0.9))
    put(tuned, dataclasses.replace(answer(), plan=Plan(Candidate(EVIL))), version=1, reason=EVIL)
    for path in (PATH, "/trials/5", "/trials/7"):
        page = get(client, path)
        assert EVIL in page.text
        assert len(page.all("script")) == 1
    # plotly reads some HTML in labels: it is written so that it stays text
    assert "<script" not in json.dumps(chart(client, "course"))


@pytest.mark.usefixtures("tuned")
def test_the_heat_map_shows_the_best_of_two_parameters_and_leads_to_its_trial(client: TestClient) -> None:
    page = get(client)
    assert "Best time by block_q and heads_per_chunk" in page.text
    cells = [cell["class"] for cell in page.all("td") if (cell.get("class") or "").startswith("heat")]
    assert sorted(str(cell) for cell in cells) == ["heat-0", "heat-5", "heat-6", "heat-bad", "heat-none", "heat-none"]
    assert "/trials/3" in page.links
    turned = get(client, x="heads_per_chunk", y="block_q")
    assert "Best time by heads_per_chunk and block_q" in turned.text


@pytest.mark.usefixtures("tuned")
def test_parameters_are_filters_in_the_url(client: TestClient) -> None:
    page = get(client, **{"p.heads_per_chunk": "8"})
    assert "1 trial of 4" in page.text
    assert [option["value"] for option in page.all("option") if "selected" in option][-1] == "8"
    (parallel,) = [part["data-chart"] for part in page.all("div") if "parallel" in str(part.get("data-chart"))]
    assert parallel == f"{PATH}/charts/parallel?p.heads_per_chunk=8"
    assert "4 trials" in get(client, **{"p.heads_per_chunk": "", "p.unknown": "8", "x": "odd", "space": "odd"}).text


@pytest.mark.usefixtures("tuned")
def test_bars_carry_the_spread_and_the_colour_of_their_backend(client: TestClient) -> None:
    (bars,) = chart(client, "backends")["data"]
    assert bars["x"] == [10, 30]
    assert bars["marker"] == {"color": ["@backend-cpu-tiled", "@backend-sdpa"]}
    whiskers = bars["error_x"]
    assert whiskers["array"] == pytest.approx([0.3, 0.9])
    assert whiskers["arrayminus"] == pytest.approx([0.2, 0.6])


@pytest.mark.usefixtures("tuned")
def test_the_course_can_be_zoomed_and_has_two_axes(client: TestClient) -> None:
    page = get(client, axis="linear")
    assert f"{PATH}/charts/course?axis=linear" in [part.get("data-chart") for part in page.all("div")]
    near = chart(client, "course", **{"from": 2, "to": 3})["data"]
    assert [trace["x"] for trace in near if trace["name"] == "cpu_tiled"] == [[2, 3]]
    for odd in ("-1", "x", "9" * 30):
        assert chart(client, "course", **{"from": odd, "to": odd})["data"]


def test_history_says_what_replaced_what_and_whether_it_fell_back(client: TestClient, tuned: Database) -> None:
    newer = dataclasses.replace(SOFTWARE, torch="2.14.0")
    evidence = answer().evidence
    assert evidence is not None
    slower = dataclasses.replace(
        answer(software=newer),
        plan=Plan(tiled(64)),
        baseline_ms=28.0,
        expected_ms=14.0,
        evidence=dataclasses.replace(evidence, measured=datetime(2026, 11, 25, tzinfo=UTC), finalists=()),
    )
    put(tuned, slower, version=1, reason="torch became better")
    page = get(client)
    for words in ("torch became better", "torch 2.13.0 -> 2.14.0", f"replaced {TILED}", "33% less than before"):
        assert words in page.text
    assert {"version-1", "version-2"} <= {row.get("id") for row in page.all("tr")}
    (line,) = chart(client, "history")["data"]
    assert line["y"] == [3, 2]
    assert line["customdata"] == ["#version-1", "#version-2"]


def test_a_search_without_a_final_shows_its_trials(client: TestClient, sqlite: Database) -> None:
    keep(sqlite, *TRIALS)
    page = get(client)
    assert "No final yet" in page.text
    assert f"tilewise tune --problem {PROBLEM.key}" in page.text
    assert client.get(f"{PATH}/charts/backends").status_code == 404


def test_an_answer_without_trials_is_shown_too(client: TestClient, sqlite: Database) -> None:
    put(sqlite, dataclasses.replace(answer(), evidence=None))
    page = get(client)
    assert "No trials are kept here" in page.text
    assert "came without its final" in page.text


@pytest.mark.parametrize("path", [PATH, "/trials/1", "/problems/nothing/nothing", "/trials/x", "/nothing"])
def test_what_is_not_there_says_so_as_a_page(client: TestClient, path: str) -> None:
    status = 422 if path.endswith(("/nothing/nothing", "/x")) else 404
    page = html.get(client, path, status=status)
    assert str(status) in page.text
    assert "/" in page.links
    reply = client.get(path, headers={"Accept": "application/json"})
    assert reply.headers["content-type"] == "application/problem+json"
    api = client.get("/v1/nothing", headers=html.BROWSER)
    assert api.headers["content-type"] == "application/problem+json"


def test_the_roofline_says_which_peaks_it_used(client: TestClient, sqlite: Database) -> None:
    h200 = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141, power_limit_w=500)
    problem = Problem(batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128)
    with sqlite.write() as session:
        DeviceRepository(session).save(h200)
    put(sqlite, answer(problem, device_key=h200.key))
    path = f"/problems/{h200.key}/{problem.key}"
    page = get(client, path)
    assert "989 TFLOP/s dense for fp16, 4,800 GB/s (NVIDIA H200 data sheet, 700 W)" in page.text
    assert "limited to 500 W" in page.text
    figure = client.get(f"{path}/charts/roofline").json()
    assert figure["data"][0]["y"][-1] == 989
    rates = {trace["name"]: trace["y"] for trace in figure["data"][1:]}
    assert rates["cpu_tiled"] == pytest.approx([problem.forward_flops / 10e-3 / 1e12])


def test_a_training_step_has_no_place_under_the_roof(client: TestClient, sqlite: Database) -> None:
    h200 = Device(kind=DeviceKind.CUDA, name="NVIDIA H200", arch="sm_90", units=132, memory_gib=141)
    problem = Problem(pass_=Pass.TRAINING, batch=1, heads=64, kv_heads=8, q_len=4096, head_dim=128)
    with sqlite.write() as session:
        DeviceRepository(session).save(h200)
    put(sqlite, answer(problem, device_key=h200.key))
    page = get(client, f"/problems/{h200.key}/{problem.key}")
    assert "no agreed count of operations" in page.text


@pytest.mark.usefixtures("tuned")
def test_a_trial_has_a_page_with_its_message_and_its_command(client: TestClient) -> None:
    page = get(client, "/trials/5")
    assert f"out is off by {EVIL}" in page.text
    assert "wrong result" in page.text
    assert PATH in page.links
    right = get(client, "/trials/3")
    for words in ("block_q 128", "10.0 ms", "3.00\N{MULTIPLICATION SIGN} as fast", "torch 2.13.0, triton 3.7.1"):
        assert words in right.text


def test_commands_say_what_was_measured() -> None:
    quick = commands.tune(PROBLEM, BUDGETS["quick"])
    assert quick == f"tilewise tune --problem {PROBLEM.key} --fresh --budget quick"
    other = commands.tune(PROBLEM, budget_named("quick", trials=9, seconds=2.5))
    assert other == f"tilewise tune --problem {PROBLEM.key} --fresh --budget quick --trials 9 --seconds 2.5"
    words = shlex.split(commands.attempt(PROBLEM, TILED))
    assert words[:4] == ["tilewise", "try", PROBLEM.key, "--candidate"]
    assert Candidate.from_json(json.loads(words[4])) == TILED
    assert {tune.tune.__name__, attempt.attempt.__name__} == {"tune", "attempt"}


def test_the_budget_of_the_job_is_in_the_command(client: TestClient, sqlite: Database) -> None:
    evidence = answer().evidence
    assert evidence is not None
    with sqlite.write() as session:
        job = JobRepository(session).create(PROBLEM, DEVICE, budget_named("full", trials=33))
    put(sqlite, dataclasses.replace(answer(), evidence=dataclasses.replace(evidence, job=job.id)))
    assert f"tilewise tune --problem {PROBLEM.key} --fresh --budget full --trials 33" in get(client).text


def test_news_come_with_a_new_trial_or_version(client: TestClient, tuned: Database) -> None:
    (notice,) = [tag for tag in get(client).all("div") if tag.get("class") == "news"]
    ask = str(notice["data-url"])
    assert client.get(ask).json() == {"mark": notice["data-mark"]}
    keep(tuned, tried(tiled(32), 0.7))
    later = client.get(ask).json()
    assert later != {"mark": notice["data-mark"]}
    put(tuned, answer(), version=1)
    assert client.get(ask).json() != later
