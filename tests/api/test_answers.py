"""GET /v1/answers."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, answer

from tilewise.api import schemas
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain import codec
from tilewise.domain.answer import Answer, Match
from tilewise.domain.matching import default_answer
from tilewise.domain.snapshot import Snapshot

ONE = f"/v1/answers/{DEVICE}/{PROBLEM.key}"
ALL = f"/v1/answers/{DEVICE}"


def put(database: Database, new: Answer, expected_version: int = 0) -> None:
    with database.write() as session:
        assert AnswerRepository(session).replace(new, expected_version=expected_version, reason="test")


class TestOne:
    def test_the_body_is_the_canonical_answer(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        reply = client.get(ONE, params={"software": SOFTWARE.key})
        assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
        assert codec.from_json(Answer, reply.json()) == answer()
        assert reply.content == codec.canonical(codec.from_json(Answer, reply.json()))
        assert schemas.Answer.model_validate_json(reply.content).match == "exact"

    def test_other_software_makes_it_stale(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        reply = client.get(ONE, params={"software": dataclasses.replace(SOFTWARE, torch="2.14.0").key})
        found = codec.from_json(Answer, reply.json())
        assert (found.match, found.missed) == (Match.STALE, "software: torch 2.13.0 -> 2.14.0")

    def test_no_software_is_not_compared(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        assert client.get(ONE).json()["match"] == "exact"

    def test_a_problem_is_found_by_its_bucket(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        shorter = dataclasses.replace(PROBLEM, q_len=2000, kv_len=2000)
        found = codec.from_json(Answer, client.get(f"/v1/answers/{DEVICE}/{shorter.key}").json())
        assert (found.match, found.problem, found.measured) == (Match.EXACT, shorter, PROBLEM)

    @pytest.mark.parametrize("device_key", [DEVICE, "nobody-knows.this"])
    def test_what_was_never_measured_gets_the_default(self, client: TestClient, device_key: str) -> None:
        reply = client.get(f"/v1/answers/{device_key}/{PROBLEM.key}")
        expected = default_answer(PROBLEM, device_key, f"problem: {PROBLEM.key} was not measured on {device_key}")
        assert reply.status_code == 200
        assert codec.from_json(Answer, reply.json()) == expected

    def test_a_new_verdict_is_served_at_once(self, client: TestClient, sqlite: Database) -> None:
        versions = []
        for version in range(3):
            put(sqlite, answer(), expected_version=version)
            versions.append(client.get(ONE).json()["version"])
        assert versions == [1, 2, 3]

    @pytest.mark.parametrize("form", ["{tag}", '"other", {tag}', "*"])
    def test_who_has_it_gets_304(self, client: TestClient, sqlite: Database, form: str) -> None:
        put(sqlite, answer())
        tag = client.get(ONE).headers["etag"]
        reply = client.get(ONE, headers={"If-None-Match": form.format(tag=tag)})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)

    def test_a_new_verdict_has_another_tag(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        tag = client.get(ONE).headers["etag"]
        put(sqlite, answer(), expected_version=1)
        reply = client.get(ONE, headers={"If-None-Match": tag})
        assert reply.status_code == 200
        assert reply.headers["etag"] != tag


class TestAll:
    def test_the_body_is_a_snapshot_of_the_device(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        put(sqlite, answer(device_key="other.device"))
        reply = client.get(ALL)
        found = Snapshot.loads(reply.content)
        assert found.answers == (answer(),)
        assert reply.headers["etag"] == f'W/"{found.id}"'
        assert client.get(ALL, headers={"If-None-Match": reply.headers["etag"]}).status_code == 304
        assert schemas.Snapshot.model_validate_json(reply.content).id == found.id

    def test_a_device_without_answers_has_the_empty_snapshot(self, client: TestClient) -> None:
        assert Snapshot.loads(client.get("/v1/answers/nobody-knows.this").content).answers == ()

    def test_many_answers_travel_gzipped(self, client: TestClient, sqlite: Database) -> None:
        for batch in range(1, 30):
            put(sqlite, answer(dataclasses.replace(PROBLEM, batch=batch)))
        with client.stream("GET", ALL, headers={"Accept-Encoding": "gzip"}) as reply:
            raw = b"".join(reply.iter_raw())
        assert reply.headers["content-encoding"] == "gzip"
        plain = client.get(ALL, headers={"Accept-Encoding": "identity"})
        assert "content-encoding" not in plain.headers
        assert gzip.decompress(raw) == plain.content
        assert len(raw) * 5 < len(plain.content)
        assert {reply.headers["vary"], plain.headers["vary"]} == {"Accept-Encoding"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "field", "detail"),
        [
            (f"/v1/answers/{DEVICE}/attention", "problem_key", "not a problem key: 'attention'"),
            (
                f"/v1/answers/{DEVICE}/inference.fp16.b1.h8.kv3.q1.k1.d64",
                "problem_key",
                "heads must be a multiple of kv_heads, got heads=8 and kv_heads=3",
            ),
            (f"/v1/answers/{DEVICE}/{PROBLEM.key.replace('.causal', '')}-0", "problem_key", "not the canonical key"),
            (f"/v1/answers/{DEVICE}/inference.fp16.b{'9' * 5000}", "problem_key", "at most 255 characters"),
            (f"/v1/answers/My%20GPU/{PROBLEM.key}", "device_key", "not a device key: 'My GPU'"),
            ("/v1/answers/a%00b", "device_key", "not a device key"),
            (f"/v1/answers/{'a' * 300}", "device_key", "at most 200 characters"),
            (f"{ONE}?software=torch", "software", "expected name@version"),
            (f"{ONE}?software={'a' * 5000}", "software", "at most 4000 characters"),
        ],
    )
    def test_what_makes_no_sense_is_named(self, client: TestClient, path: str, field: str, detail: str) -> None:
        reply = client.get(path)
        document = reply.json()
        assert (reply.status_code, reply.headers["content-type"]) == (422, "application/problem+json")
        assert document["type"] == "urn:tilewise:error:invalid-parameter"
        assert (document["field"], document["status"]) == (field, 422)
        assert detail in document["detail"]

    def test_huge_sizes_are_answered_at_once(self, client: TestClient) -> None:
        key = f"inference.fp16.b1.h8.kv8.q{10**30}.k{10**30}.d64.causal"
        assert client.get(f"/v1/answers/{DEVICE}/{key}").json()["match"] == "default"

    def test_unknown_paths_and_methods_are_problems_too(self, client: TestClient) -> None:
        for reply, status, name in (
            (client.get("/v1/nothing"), 404, "not-found"),
            (client.post(ONE), 405, "method-not-allowed"),
        ):
            assert (reply.status_code, reply.headers["content-type"]) == (status, "application/problem+json")
            assert reply.json()["type"] == f"urn:tilewise:error:{name}"

    def test_answers_outlive_their_database_and_the_rest_is_503_without_its_address(
        self, client: TestClient, sqlite: Database
    ) -> None:
        put(sqlite, answer())
        assert client.get(ONE).json()["match"] == "exact"
        assert sqlite.file is not None
        sqlite.close()
        sqlite.file.rename(sqlite.file.with_name("elsewhere.db"))
        assert client.get(ONE).json()["match"] == "exact"
        assert Snapshot.loads(client.get(ALL).content).answers == (answer(),)
        for path in ("/readyz", "/", "/v1/jobs", "/v1/trials", "/v1/demand"):
            reply = client.get(path)
            assert (reply.status_code, reply.headers["content-type"]) == (503, "application/problem+json")
            assert reply.json()["type"] == "urn:tilewise:error:database-unavailable"
            assert "tilewise.db" not in reply.text
        assert client.get("/healthz").status_code == 200

    def test_a_mistake_of_ours_tells_nothing(self, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        from tilewise.api.app import create_app

        def fail(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr("tilewise.api.answer_book.match", fail)
        asker = TestClient(create_app(sqlite), raise_server_exceptions=False)
        reply = asker.get(ONE)
        assert (reply.status_code, reply.json()["type"]) == (500, "urn:tilewise:error:internal-error")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"]
        counted = [
            line for line in asker.get("/metrics").text.splitlines() if line.startswith("tilewise_requests_total")
        ]
        assert any('status="500"' in line and line.endswith(" 1.0") for line in counted)


class TestDescription:
    def test_the_models_have_the_fields_of_the_types(self) -> None:
        whole = codec.to_json(answer())
        strict = schemas.Answer.model_validate(whole, strict=False)
        assert json.loads(strict.model_dump_json()) == whole

    def test_the_examples_are_answers(self) -> None:
        examples = schemas.Answer.model_json_schema()["examples"]
        assert [codec.to_json(codec.from_json(Answer, example)) for example in examples] == examples
        assert [example["match"] for example in examples] == ["exact", "predicted"]

    def test_the_document_lists_the_routes_and_their_errors(self, client: TestClient) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        assert set(paths) == {
            "/healthz",
            "/metrics",
            "/readyz",
            "/v1/answers",
            "/v1/answers/{device_key}",
            "/v1/answers/{device_key}/{problem_key}",
            "/v1/audit",
            "/v1/tokens",
            "/v1/tokens/{token_id}",
            "/v1/channels",
            "/v1/channels/{name}",
            "/v1/channels/{name}/rollback",
            "/v1/channels/{name}/snapshot",
            "/v1/demand",
            "/v1/devices",
            "/v1/jobs",
            "/v1/jobs/{job_id}",
            "/v1/jobs/{job_id}/events",
            "/v1/problems",
            "/v1/snapshots",
            "/v1/snapshots/{snapshot_id}",
            "/v1/trials",
            "/v1/usage",
        }
        found = paths["/v1/answers/{device_key}/{problem_key}"]["get"]["responses"]
        assert set(found) == {"200", "304", "401", "403", "413", "422", "429", "500"}
        assert set(found["422"]["content"]) == {"application/problem+json"}


def test_a_service_does_not_start_on_a_wrong_schema(tmp_path: Path) -> None:
    from sqlalchemy import text

    from tilewise.api.app import create_app
    from tilewise.domain.errors import SchemaVersionError

    with Database.open(f"sqlite:///{tmp_path / 'x.db'}", upgrade=True) as database:
        with database.write() as session:
            session.execute(text("UPDATE tilewise_version SET version_num = '9999'"))
        with pytest.raises(SchemaVersionError, match="newer tilewise"), TestClient(create_app(database)):
            pass


class TestMany:
    def test_answers_come_in_the_order_of_the_problems(self, client: TestClient, sqlite: Database) -> None:
        put(sqlite, answer())
        other = dataclasses.replace(PROBLEM, head_dim=32, v_head_dim=32)
        question = {"device": DEVICE, "problems": [PROBLEM.key, other.key, PROBLEM.key], "software": SOFTWARE.key}
        for _ in range(2):  # the second time from the bytes at hand
            reply = client.post("/v1/answers", json=question)
            found = [codec.from_json(Answer, item) for item in reply.json()["answers"]]
            assert [(one.problem, one.match) for one in found] == [
                (PROBLEM, Match.EXACT), (other, Match.DEFAULT), (PROBLEM, Match.EXACT)
            ]  # fmt: skip
            assert found[0] == dataclasses.replace(answer(), evidence=None)
        whole = client.post("/v1/answers", json={**question, "evidence": True}).json()["answers"][0]
        assert codec.from_json(Answer, whole) == answer()

    def test_a_new_verdict_is_served_at_once(self, client: TestClient, sqlite: Database) -> None:
        versions = []
        for version in range(3):
            put(sqlite, answer(), expected_version=version)
            reply = client.post("/v1/answers", json={"device": DEVICE, "problems": [PROBLEM.key]})
            versions.append(reply.json()["answers"][0]["version"])
        assert versions == [1, 2, 3]

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"problems": [PROBLEM.key, "nonsense"]}, "problems.1"),
            ({"problems": ["x"] * 1001}, "problems"),
            ({"device": "My GPU"}, "device"),
            ({"software": "torch"}, "software"),
            ({"problems": [5]}, "problems.0"),
            ({"evidence": "perhaps"}, "evidence"),
        ],
    )
    def test_what_makes_no_sense_is_named(self, client: TestClient, change: dict[str, object], field: str) -> None:
        reply = client.post("/v1/answers", json={"device": DEVICE, "problems": [PROBLEM.key], **change})
        assert (reply.status_code, reply.json()["field"]) == (422, field)


def test_another_process_that_writes_is_followed(client: TestClient, sqlite: Database) -> None:
    assert client.get(ONE).json()["match"] == "default"
    assert sqlite.file is not None
    book = client.app.state.answer_book  # type: ignore[attr-defined]
    with Database.open(f"sqlite:///{sqlite.file}", upgrade=False) as other:
        put(other, answer())
    book.refresh()  # what its thread does a few times a second
    assert client.get(ONE).json()["match"] == "exact"


def test_a_lookup_touches_no_sql(client: TestClient, sqlite: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    put(sqlite, answer())
    client.get(ONE)
    client.app.state.answer_book.follower.stop()  # type: ignore[attr-defined]

    def fail(*_: object) -> None:
        raise AssertionError("the database was asked")

    monkeypatch.setattr(sqlite, "read", fail)
    problems = [PROBLEM.key, dataclasses.replace(PROBLEM, head_dim=32, v_head_dim=32).key]
    for path in (ONE, ALL, *(f"/v1/answers/{DEVICE}/{key}" for key in problems)):
        assert client.get(path).status_code == 200
    assert client.post("/v1/answers", json={"device": DEVICE, "problems": problems}).status_code == 200
