"""Pages of jobs, devices, snapshots, demand, tokens and comparisons, without a browser, on every database."""

import dataclasses
import re
from collections.abc import Iterator
from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, answer

from tilewise.api.app import create_app
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.pins import PinRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import AuditRepository, TokenRepository
from tilewise.domain.answer import Answer, Match
from tilewise.domain.job import BUDGETS
from tilewise.domain.problem import Problem
from tilewise.domain.token import Scope
from tilewise.domain.usage import Usage, Use

OTHER = "made-up-gpu.sm90.80g"
EVIL = "<script>alert('\N{LATIN SMALL LETTER E WITH ACUTE}')</script>"
SIZES = [dataclasses.replace(PROBLEM, q_len=length, kv_len=length) for length in (512, 1024, 2048)]
COMPARISONS = ["/compare", "/compare/backends", "/compare/devices", "/compare/software"]
PATHS = [
    "/jobs", "/jobs/new", "/devices", f"/devices/{DEVICE}/software", "/snapshots", "/snapshots/diff", "/demand",
    *COMPARISONS, *(f"{path}/chart" for path in COMPARISONS[1:]),
]  # fmt: skip
PARAMETERS = (
    "device", "problem", "state", "after", "page", "size", "family", "pass", "dtype", "a", "b", "backend", "before",
)  # fmt: skip
NONSENSE = ("%00", "%FF", "-1", "999999999999999999999", "%27%22%3C", "x" * 3000, "e30=", "WyJhIiwgMV0=")


def put(database: Database, *answers: Answer) -> None:
    with database.write() as session:
        for one in answers:
            repository = AnswerRepository(session)
            standing = repository.get(one.device_key, one.problem)
            assert repository.replace(one, expected_version=standing.version if standing else 0, reason=EVIL)


@pytest.fixture
def filled(database: Database) -> Iterator[tuple[TestClient, Database, str]]:
    """A service with something of everything, all of it named by somebody who means ill, and the id of its job."""
    put(database, *map(answer, SIZES), answer(device_key=OTHER))
    evidence = answer().evidence
    assert evidence is not None
    later = dataclasses.replace(evidence, measured=evidence.measured + timedelta(days=1))
    put(database, dataclasses.replace(answer(software=dataclasses.replace(SOFTWARE, torch="2.14.0")), evidence=later))
    with database.write() as session:
        jobs = JobRepository(session)
        job = jobs.create(PROBLEM, DEVICE, BUDGETS["quick"]).id
        attempt = jobs.start(job)
        assert attempt is not None
        jobs.progress(job, attempt, progress=0.5, message=EVIL)
        frozen = SnapshotRepository(session).freeze(AnswerRepository(session).snapshot(), note=EVIL)
        ChannelRepository(session).move("stable", frozen.id, reason=EVIL, actor=EVIL)
        AuditRepository(session).add(EVIL, "channel.move", EVIL, EVIL)
        PinRepository(session).add(frozen.id, DEVICE, EVIL)
        missed = Use(problem=Problem(batch=2, heads=8, q_len=4096, head_dim=64), match=Match.DEFAULT, calls=10**6)
        DemandRepository(session).add(Usage(device_key=DEVICE, snapshot=frozen.id, uses=(missed,)))
    with TestClient(create_app(database)) as client:
        yield client, database, job


def test_nothing_that_people_write_becomes_a_part_of_a_page(filled: tuple[TestClient, Database, str]) -> None:
    client, database, job = filled
    with database.read() as session:
        snapshot = SnapshotRepository(session).page().items[0].id
    seen = 0
    for path in ["/", *PATHS, f"/jobs/{job}", f"/snapshots/{snapshot}", "/tokens"]:
        reply = client.get(path, headers={"Accept": "text/html"})
        assert reply.status_code == 200, path
        assert "<script>" not in reply.text, path
        seen += "&lt;script&gt;" in reply.text
    assert seen >= 5
    with database.write() as session:
        secret = TokenRepository(session).create(EVIL, (Scope.ADMIN,))[1]
    for path in ("/tokens", "/jobs"):
        text = client.get(path, headers={"Authorization": f"Bearer {secret}"}).text
        assert "<script>" not in text
        assert "&lt;script&gt;alert" in text


def test_what_makes_no_sense_in_a_query_is_no_mistake(filled: tuple[TestClient, Database, str]) -> None:
    for path in PATHS:
        for value in NONSENSE:
            reply = filled[0].get(path + "?" + "&".join(f"{name}={value}" for name in PARAMETERS))
            assert reply.status_code in (200, 404), (path, value, reply.text)


def test_sizes_devices_and_versions_are_compared(filled: tuple[TestClient, Database, str]) -> None:
    client = filled[0]
    page = client.get("/compare", params={"device": DEVICE}).text
    assert "1 group of problems that differ in their tokens alone" in re.sub(r"\s+", " ", page)
    link = re.search(r'data-chart="([^"]*)"', page)
    assert link
    figure = client.get(link[1].replace("&amp;", "&")).json()
    assert [(trace["name"], trace["x"]) for trace in figure["data"]] == [
        ("cpu_tiled", [512, 1024, 2048]), ("sdpa", [512, 1024, 2048]),
    ]  # fmt: skip
    assert figure["data"][0]["y"] == pytest.approx([3, 3, 3])
    assert figure["data"][0]["customdata"][0] == f"/problems/{DEVICE}/{SIZES[0].key}"
    devices = client.get("/compare/devices").text
    assert f"{DEVICE}</option>" in devices
    assert ">1<" in re.sub(r"\s", "", devices.split("Problems of both")[1])[:20]
    software = client.get("/compare/software", params={"device": DEVICE}).text
    assert "torch 2.13.0 -&gt; 2.14.0" in software
    assert PROBLEM.key in software.replace("<wbr>", "")
    duel = client.get("/compare/backends", params={"device": DEVICE, "a": "cpu_tiled", "b": "sdpa"}).text
    assert "of 3 finals" in duel
    assert "cpu_tiled against sdpa" in duel


def test_a_comparison_follows_the_answers(filled: tuple[TestClient, Database, str]) -> None:
    client, database, _ = filled
    query = {"device": DEVICE, "a": "cpu_tiled", "b": "sdpa"}
    assert "of 3 finals" in client.get("/compare/backends", params=query).text
    put(database, answer(dataclasses.replace(PROBLEM, batch=7)))
    assert "of 4 finals" in client.get("/compare/backends", params=query).text


def test_the_notice_of_jobs_knows_a_change(filled: tuple[TestClient, Database, str]) -> None:
    client, database, job = filled
    before = client.get("/jobs/news").json()["mark"]
    assert f'data-mark="{before}"' in client.get("/jobs").text
    with database.write() as session:
        JobRepository(session).cancel(job)
    cancelled = client.get("/jobs/news").json()["mark"]
    with database.write() as session:
        JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"])
    assert len({before, cancelled, client.get("/jobs/news").json()["mark"]}) == 3


def test_events_go_on_behind_the_one_that_is_named(filled: tuple[TestClient, Database, str]) -> None:
    client, database, job = filled
    with database.write() as session:
        JobRepository(session).cancel(job)
    whole = client.get(f"/v1/jobs/{job}/events").text
    ids = [int(found) for found in re.findall(r"^id: (\d+)", whole, re.MULTILINE)]
    rest = client.get(f"/v1/jobs/{job}/events", params={"after": ids[1]}).text
    assert re.findall(r"^id: (\d+)", rest, re.MULTILINE) == [str(each) for each in ids[2:]]
    header = client.get(f"/v1/jobs/{job}/events", params={"after": ids[1]}, headers={"Last-Event-ID": str(ids[2])}).text
    assert re.findall(r"^id: (\d+)", header, re.MULTILINE) == [str(each) for each in ids[3:]]
    assert client.get(f"/v1/jobs/{job}/events", params={"after": -1}).status_code == 422


def test_another_sites_form_changes_nothing(filled: tuple[TestClient, Database, str]) -> None:
    """What a page of another site can send without asking first: forms and plain text, never JSON."""
    client, database, job = filled
    body = f'{{"problem": "{PROBLEM.key}", "device": "{DEVICE}"}}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        reply = client.post("/v1/jobs", content=body, headers={"Content-Type": kind})
        assert reply.status_code == 422, kind
    with database.read() as session:
        assert [record.job.id for record in JobRepository(session).list()] == [job]
