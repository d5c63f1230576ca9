"""Jobs, lists, snapshots, channels and usage over HTTP."""

import base64
import json
import threading
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, TILED, answer, measurement

from tilewise.api.app import create_app
from tilewise.api.settings import ServiceSettings
from tilewise.db import signature
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import SnapshotRepository
from tilewise.db.tokens import AuditRepository
from tilewise.db.trials import TrialRepository
from tilewise.domain.job import JobState
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.trial import Outcome, Stage, Trial

OTHER = Problem(batch=2, heads=64, kv_heads=8, q_len=4096, head_dim=128, causal=True)
JOB = {"problem": PROBLEM.key, "device": DEVICE, "budget": "quick"}


def put(database: Database, problem: Problem = PROBLEM, expected_version: int = 0) -> None:
    with database.write() as session:
        AnswerRepository(session).replace(answer(problem), expected_version=expected_version, reason="test")


def kept(database: Database, snapshot_id: str) -> bool:
    with database.read() as session:
        return SnapshotRepository(session).file(snapshot_id) is not None


def events(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """Read a stream of server-sent events: id, name, data."""
    found = []
    for block in text.replace("\r\n", "\n").strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[:1] not in ("", ":"))
        if fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
    return found


class TestJobs:
    def test_a_job_is_queued_listed_and_cancelled(self, client: TestClient, sqlite: Database) -> None:
        reply = client.post("/v1/jobs", json={**JOB, "trials": 500, "seconds": 5})
        assert reply.status_code == 201
        job = reply.json()["job"]
        assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
        assert (job["state"], job["problem"], job["device_key"]) == ("queued", PROBLEM.key, DEVICE)
        assert (job["budget"]["trials"], job["budget"]["patience"], job["budget"]["seconds"]) == (500, 500, 5.0)
        assert client.get(reply.headers["location"]).json()["job"] == job
        assert [one["job"]["id"] for one in client.get("/v1/jobs").json()["items"]] == [job["id"]]
        assert client.get("/v1/jobs", params={"state": "running"}).json()["items"] == []
        cancelled = client.delete(reply.headers["location"]).json()["job"]
        assert cancelled["state"] == "cancelled"
        again = client.delete(reply.headers["location"])
        assert (again.status_code, again.json()["type"]) == (409, "urn:tilewise:error:conflict")
        with sqlite.read() as session:
            trail = AuditRepository(session).page().items
        assert [(entry.action, entry.subject) for entry in trail] == [
            ("job.cancel", job["id"]),
            ("job.submit", job["id"]),
        ]
        first = client.get("/v1/audit", params={"limit": 1}).json()
        rest = client.get("/v1/audit", params={"cursor": first["next"]}).json()
        assert [entry["id"] for entry in first["items"] + rest["items"]] == [entry.id for entry in trail]

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"problem": "nonsense"}, "problem"),
            ({"device": "My GPU"}, "device"),
            ({"budget": "endless"}, "budget"),
            ({"trials": 0}, "trials"),
            ({"seconds": -1}, "seconds"),
        ],
    )
    def test_a_job_that_makes_no_sense_is_named(
        self, client: TestClient, change: dict[str, object], field: str
    ) -> None:
        reply = client.post("/v1/jobs", json={**JOB, **change})
        assert (reply.status_code, reply.json()["field"]) == (422, field)
        assert client.get("/v1/jobs").json()["items"] == []

    def test_an_unknown_job_is_404(self, client: TestClient) -> None:
        for reply in (
            client.get("/v1/jobs/abc"), client.delete("/v1/jobs/abc"), client.get("/v1/jobs/abc/events")
        ):  # fmt: skip
            assert (reply.status_code, reply.json()["type"]) == (404, "urn:tilewise:error:not-found")

    def test_events_are_streamed_to_the_end_and_resumed(self, client: TestClient, sqlite: Database) -> None:
        job = client.post("/v1/jobs", json=JOB).json()["job"]["id"]
        with sqlite.write() as session:
            jobs = JobRepository(session)
            jobs.claim(DEVICE, "w", lease=60)
            jobs.progress(job, 1, progress=0.5, message="12 of 24\nbest: 1.5 ms")

        def end() -> None:
            with sqlite.write() as session:
                JobRepository(session).finish(job, 1, JobState.SUCCEEDED, message="done")

        later = threading.Timer(0.3, end)  # while the stream is open
        later.start()
        reply = client.get(f"/v1/jobs/{job}/events")
        later.join()
        assert reply.headers["content-type"].startswith("text/event-stream")
        found = events(reply.text)
        assert [name for _, name, _ in found] == ["queued", "running", "running", "succeeded"]
        assert (found[2][2]["progress"], found[2][2]["message"]) == (0.5, "12 of 24\nbest: 1.5 ms")
        for number in range(1, 5):
            resumed = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": str(found[number - 1][0])})
            assert events(resumed.text) == found[number:]
        for wrong in ("x", "-1", "9" * 20, "²"):
            headers = {"Last-Event-ID": wrong.encode("latin-1")}
            reply = client.get(f"/v1/jobs/{job}/events", headers=headers)  # type: ignore[arg-type]
            assert (reply.status_code, reply.json()["field"]) == (422, "last-event-id")


class TestLists:
    @pytest.fixture(autouse=True)
    def filled(self, sqlite: Database) -> None:
        put(sqlite)
        with sqlite.write() as session:
            for number in range(7):
                made = Trial(
                    candidate=TILED,
                    stage=Stage.FORWARD,
                    outcome=Outcome.OK if number < 5 else Outcome.TIMED_OUT,
                    measurement=measurement(number + 1.0, 0.5) if number < 5 else None,
                )
                TrialRepository(session).add(
                    made, problem=OTHER if number % 2 else PROBLEM, device_key=DEVICE, software=SOFTWARE
                )

    def pages(self, client: TestClient, path: str, **parameters: object) -> list[Any]:
        found, cursor = [], None
        while True:
            given = {name: value for name, value in {**parameters, "cursor": cursor}.items() if value is not None}
            page = client.get(path, params=given).json()  # type: ignore[arg-type]
            found += page["items"]
            cursor = page["next"]
            if cursor is None:
                return found

    @pytest.mark.parametrize(
        ("order", "numbers"),
        [("id", [1, 3, 5, 7]), ("-id", [7, 5, 3, 1]), ("median_ms", [1, 3, 5]), ("-median_ms", [5, 3, 1])],
    )
    def test_trials_by_page(self, client: TestClient, order: str, numbers: list[int]) -> None:
        found = self.pages(client, "/v1/trials", order=order, limit=2, problem=PROBLEM.key)
        assert [one["id"] for one in found] == numbers  # the medians grow with the numbers; the last has none

    def test_medians_of_different_problems_are_not_compared(self, client: TestClient) -> None:
        reply = client.get("/v1/trials", params={"order": "median_ms"})
        assert (reply.status_code, reply.json()["field"]) == (422, "order")

    @pytest.mark.parametrize(
        ("filters", "numbers"),
        [
            ({"problem": OTHER.key}, [6, 4, 2]),
            ({"outcome": "timed_out"}, [7, 6]),
            ({"backend": "cpu_tiled", "device": DEVICE, "outcome": "ok"}, [5, 4, 3, 2, 1]),
            ({"device": "other.device"}, []),
            ({"job": "abc"}, []),
        ],
    )
    def test_trials_are_filtered(self, client: TestClient, filters: dict[str, str], numbers: list[int]) -> None:
        assert [one["id"] for one in self.pages(client, "/v1/trials", limit=2, **filters)] == numbers

    def test_problems_and_devices(self, client: TestClient) -> None:
        assert self.pages(client, "/v1/problems", limit=1) == sorted([PROBLEM.key, OTHER.key])
        assert self.pages(client, "/v1/problems", order="-key") == sorted([PROBLEM.key, OTHER.key], reverse=True)
        assert self.pages(client, "/v1/problems", head_dim=128, causal=True, dtype="fp16") == [OTHER.key]
        assert self.pages(client, "/v1/problems", q="window") == [PROBLEM.key]
        assert self.pages(client, "/v1/devices", q="epyc") == [{"key": DEVICE, "device": None}]

    @pytest.mark.parametrize("path", ["/v1/trials", "/v1/problems", "/v1/devices", "/v1/jobs", "/v1/snapshots"])
    def test_a_cursor_of_another_list_is_refused(self, client: TestClient, path: str) -> None:
        for values in ([1, 2, 3], {"a": 1}, ["\0"], [10**30], ["2026-01-01T00:00:00", "x"], [True], "x", None):
            cursor = base64.urlsafe_b64encode(json.dumps(values).encode()).decode()
            reply = client.get(path, params={"cursor": cursor})
            assert (reply.status_code, reply.json()["field"]) == (422, "cursor"), values
        assert client.get(path, params={"cursor": "\N{SNOWMAN}"}).status_code == 422


class TestSnapshots:
    def test_freeze_point_and_roll_back(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite)
        first = client.post("/v1/snapshots", json={"device": DEVICE, "note": "one"}).json()
        put(sqlite, OTHER)
        second = client.post("/v1/snapshots", json={}).json()
        assert (first["answers"], second["answers"]) == (1, 2)
        assert client.post("/v1/snapshots", json={"note": "again"}).json() == second
        listed = client.get("/v1/snapshots").json()["items"]
        assert [one["id"] for one in listed] == [second["id"], first["id"]]
        reply = client.get(f"/v1/snapshots/{first['id']}")
        assert Snapshot.loads(reply.content).id == first["id"]
        tag = reply.headers["etag"]
        assert client.get(f"/v1/snapshots/{first['id']}", headers={"If-None-Match": tag}).status_code == 304

        for each in (first, second):
            move = {"snapshot": each["id"], "reason": "tested"}
            assert client.put("/v1/channels/stable", json=move).json()["snapshot"] == each["id"]
        assert Snapshot.loads(client.get("/v1/channels/stable/snapshot").content).id == second["id"]
        back = client.post("/v1/channels/stable/rollback", json={"reason": "slower"}).json()
        assert back["snapshot"] == first["id"]
        assert [change["reason"] for change in back["history"]] == ["slower", "tested", "tested"]
        assert client.get("/v1/channels").json() == {"names": ["stable"]}
        assert client.get("/v1/channels/stable").json() == back

    def test_what_is_not_there_is_404(self, client: TestClient) -> None:
        missing = "0" * 64
        for reply in (
            client.get(f"/v1/snapshots/{missing}"),
            client.get("/v1/channels/stable"),
            client.get("/v1/channels/stable/snapshot"),
            client.put("/v1/channels/stable", json={"snapshot": missing}),
            client.post("/v1/channels/stable/rollback", json={}),
        ):
            assert (reply.status_code, reply.json()["type"]) == (404, "urn:tilewise:error:not-found")

    def test_what_a_device_was_last_sent_can_be_pinned(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite)
        found = Snapshot.loads(client.get(f"/v1/answers/{DEVICE}").content)
        assert client.get(f"/v1/snapshots/{found.id}").content == found.dumps()

    def test_what_a_job_was_sent_can_be_pinned_when_other_answers_stand(self, sqlite: Database) -> None:
        put(sqlite)
        with TestClient(create_app(sqlite)) as client:
            sent = Snapshot.loads(client.get(f"/v1/answers/{DEVICE}").content)
            put(sqlite, expected_version=1)
            assert Snapshot.loads(client.get(f"/v1/answers/{DEVICE}").content).id != sent.id
            # at once from memory, soon after from the database
            assert client.get(f"/v1/snapshots/{sent.id}").content == sent.dumps()
            end = time.monotonic() + 5
            while not kept(sqlite, sent.id):
                assert time.monotonic() < end, "what was sent was not kept"
                time.sleep(0.02)
            usage = {"device": DEVICE, "snapshot": sent.id, "uses": []}
            assert client.post("/v1/usage", json=usage).status_code == 204
        with TestClient(create_app(sqlite)) as client:  # another process, which never sent it
            assert client.get(f"/v1/snapshots/{sent.id}").content == sent.dumps()

    @pytest.mark.parametrize("encoding", ["gzip", "identity"])
    def test_a_service_with_a_key_signs(self, sqlite: Database, encoding: str) -> None:
        put(sqlite)
        private, public = signature.generate()
        with TestClient(create_app(sqlite, ServiceSettings(signing_key=private))) as client:
            reply = client.get(f"/v1/answers/{DEVICE}", headers={"Accept-Encoding": encoding})
            found = Snapshot.loads(reply.content)
        assert found.answers == (answer(),)
        assert found.signature is not None
        key = Ed25519PublicKey.from_public_bytes(base64.b64decode(public))
        key.verify(base64.b64decode(found.signature), found.id.encode())
        assert Snapshot.of([answer()]).signed(found.signature).dumps() == reply.content


class TestUsage:
    def test_what_was_missed_is_listed_as_time_lost(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite)
        uses = [
            {"problem": OTHER.key, "match": "default", "calls": 100},
            {"problem": PROBLEM.key, "match": "exact", "calls": 9},
        ]
        for _ in range(2):
            report = client.post("/v1/usage", json={"device": DEVICE, "snapshot": "a" * 64, "uses": uses})
            assert (report.status_code, report.content) == (204, b"")
        missed, used = client.get("/v1/demand").json()["items"]
        assert (missed["problem"], missed["calls"], missed["missed"]) == (OTHER.key, 200, 200)
        assert missed["lost_ms"] == pytest.approx(200 * missed["expected_ms"] * missed["loss"])
        assert (used["problem"], used["calls"], used["lost_ms"], used["standing"]) == (PROBLEM.key, 18, 0, True)
        assert client.get("/v1/demand", params={"device": "other.device"}).json() == {"items": []}

    @pytest.mark.parametrize(
        ("use", "field"),
        [
            ({"problem": "x", "match": "exact", "calls": 1}, "uses.0.problem"),
            ({"problem": PROBLEM.key, "match": "lucky", "calls": 1}, "uses.0.match"),
            ({"problem": PROBLEM.key, "match": "exact", "calls": 0}, "uses.0.calls"),
            ({"problem": PROBLEM.key, "match": "exact", "calls": 2**60}, "uses.0.calls"),
        ],
    )
    def test_a_report_that_makes_no_sense_changes_nothing(
        self, client: TestClient, use: dict[str, object], field: str
    ) -> None:
        reply = client.post("/v1/usage", json={"device": DEVICE, "uses": [use]})
        assert (reply.status_code, reply.json()["field"]) == (422, field)
        assert client.get("/v1/demand").json() == {"items": []}
