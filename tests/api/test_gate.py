"""What every request passes: tokens and scopes, limits, ids, headers, metrics, logs."""

import json
import logging
from collections.abc import Iterator
from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, answer

from tilewise.api.app import create_app
from tilewise.api.assets import asset_url
from tilewise.api.log import JsonLines
from tilewise.api.settings import ServiceSettings
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.db.tokens import TokenRepository
from tilewise.domain.errors import SettingsError
from tilewise.domain.token import Scope
from tilewise.domain.trial import now

ONE = f"/v1/answers/{DEVICE}/{PROBLEM.key}"
JOB = {"problem": PROBLEM.key, "device": DEVICE, "budget": "quick"}
USAGE = {"device": DEVICE, "uses": []}


def token(database: Database, *scopes: Scope, expired: bool = False) -> dict[str, str]:
    """The header of a new token."""
    expires = now() - timedelta(seconds=1) if expired else None
    with database.write() as session:
        return {"Authorization": f"Bearer {TokenRepository(session).create('test', scopes, expires=expires)[1]}"}


def served(database: Database, **settings: object) -> TestClient:
    return TestClient(create_app(database, ServiceSettings(**settings)))  # type: ignore[arg-type]


class TestTokens:
    def test_without_any_token_this_machine_may_do_everything(self, client: TestClient) -> None:
        assert client.get(ONE).status_code == 200
        assert client.post("/v1/jobs", json=JOB).status_code == 201

    @pytest.mark.parametrize(
        ("method", "path", "body", "scope", "status"),
        [
            ("GET", ONE, None, Scope.READ, 200),
            ("GET", "/metrics", None, Scope.READ, 200),
            ("GET", "/", None, Scope.READ, 200),
            ("POST", "/v1/answers", {"device": DEVICE, "problems": []}, Scope.READ, 200),
            ("POST", "/v1/usage", USAGE, Scope.REPORT, 204),
            ("POST", "/v1/jobs", JOB, Scope.TUNE, 201),
            ("DELETE", "/v1/jobs/abc", None, Scope.TUNE, 404),
            ("POST", "/v1/snapshots", {}, Scope.ADMIN, 201),
            ("GET", "/v1/audit", None, Scope.ADMIN, 200),
            ("GET", "/v1/tokens", None, Scope.ADMIN, 200),
            ("POST", "/v1/tokens", {"name": "ci", "scopes": ["read"]}, Scope.ADMIN, 201),
            ("DELETE", f"/v1/tokens/{'0' * 16}", None, Scope.ADMIN, 404),
            ("GET", "/jobs", None, Scope.READ, 200),
            ("GET", "/tokens", None, Scope.ADMIN, 200),
            ("PUT", "/v1/channels/stable", {"snapshot": "0" * 64}, Scope.ADMIN, 404),
            ("POST", "/v1/channels/stable/rollback", {}, Scope.ADMIN, 404),
        ],
    )
    def test_each_route_needs_its_scope(
        self, client: TestClient, sqlite: Database, method: str, path: str, body: object, scope: Scope, status: int
    ) -> None:
        def ask(headers: dict[str, str]) -> int:
            reply = client.request(method, path, json=body, headers=headers)
            if reply.status_code >= 400:
                assert reply.headers["content-type"] == "application/problem+json"
            return reply.status_code

        enough, admin = token(sqlite, scope), token(sqlite, Scope.ADMIN)
        others = token(sqlite, *(other for other in Scope if other not in (scope, Scope.ADMIN)))
        assert [ask({}), ask(others), ask(enough)] == [401, 403, status]
        assert ask(admin) != 403

    def test_only_a_token_that_stands_is_let_in(self, client: TestClient, sqlite: Database) -> None:
        good, old = token(sqlite, Scope.READ), token(sqlite, Scope.READ, expired=True)
        wrong = {"Authorization": good["Authorization"][:-1] + ("A" if good["Authorization"][-1] != "A" else "B")}
        for headers in (old, wrong, {"Authorization": "Bearer x"}, {"Authorization": "Basic !"}, {}):
            reply = client.get(ONE, headers=headers)
            assert (reply.status_code, reply.json()["type"]) == (401, "urn:tilewise:error:unauthorized")
            assert reply.headers["www-authenticate"].startswith("Bearer")
        assert client.get(ONE, headers=good).status_code == 200
        with sqlite.write() as session:
            repository = TokenRepository(session)
            for each in repository.all():
                repository.revoke(each.id)
        assert client.get(ONE, headers=good).status_code == 401
        # ended tokens do not open the service again
        assert client.get(ONE).status_code == 401
        assert client.get("/healthz").status_code == client.get(asset_url("style.css")).status_code == 200

    def test_a_browser_may_send_the_token_as_password_to_look_only(self, client: TestClient, sqlite: Database) -> None:
        password = token(sqlite, Scope.ADMIN)["Authorization"].removeprefix("Bearer ")
        assert client.get("/").headers["www-authenticate"].startswith("Basic")
        assert client.get("/", auth=("me", password)).status_code == 200
        assert client.post("/v1/jobs", json=JOB, auth=("me", password)).status_code == 401

    def test_tokens_may_be_demanded_before_there_is_one(self, sqlite: Database) -> None:
        with served(sqlite, require_tokens=True) as client:
            assert client.get(ONE).status_code == 401
            assert client.get(ONE, headers=token(sqlite, Scope.READ)).status_code == 200

    def test_without_a_token_nobody_asks_under_another_domains_name(self, client: TestClient, sqlite: Database) -> None:
        for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "192.0.2.7"):
            assert client.get(ONE, headers={"Host": host}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
            reply = client.post("/v1/jobs", json=JOB, headers={"Host": host})
            assert (reply.status_code, reply.json()["type"]) == (403, "urn:tilewise:error:forbidden")
        with served(sqlite, any_host=True) as open_client:
            assert open_client.get(ONE, headers={"Host": "tilewise.internal"}).status_code == 200
        headers = {"Host": "tilewise.internal", **token(sqlite, Scope.READ)}
        assert client.get(ONE, headers=headers).status_code == 200


class TestLimits:
    def test_a_body_has_a_limit_said_or_not(self, sqlite: Database) -> None:
        def parts() -> Iterator[bytes]:
            for _ in range(10):
                yield b" " * 200

        with served(sqlite, max_body=1000) as client:
            for content in (b" " * 1001, parts()):
                reply = client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
                assert (reply.status_code, reply.json()["type"]) == (413, "urn:tilewise:error:content-too-large")
            assert client.post("/v1/jobs", json=JOB).status_code == 201

    def test_a_page_has_a_limit(self, client: TestClient) -> None:
        reply = client.get("/v1/trials", params={"limit": 201})
        assert (reply.status_code, reply.json()["field"]) == (422, "limit")

    def test_a_caller_that_asks_too_much_is_told_when_to_come_back(self, sqlite: Database) -> None:
        one, other = token(sqlite, Scope.READ), token(sqlite, Scope.READ)
        with served(sqlite, rate=0.01, burst=3) as client:
            found = [client.get(ONE, headers=one).status_code for _ in range(5)]
            assert found == [200, 200, 200, 429, 429]
            reply = client.get(ONE, headers=one)
            assert 0 < int(reply.headers["retry-after"]) <= 101
            assert reply.json()["type"] == "urn:tilewise:error:too-many-requests"
            assert client.get(ONE, headers=other).status_code == 200
            refused = [client.get(ONE, headers={"Authorization": "Bearer x"}).status_code for _ in range(4)]
            assert refused == [401, 401, 401, 429]


class TestEveryResponse:
    @pytest.mark.parametrize("path", [ONE, "/", "/v1/nothing", "/v1/jobs", asset_url("style.css"), "/metrics"])
    def test_has_the_security_headers_and_an_id(self, client: TestClient, path: str) -> None:
        for _ in range(2):
            reply = client.get(path, headers={"X-Request-ID": "run-7"})
            assert reply.headers["x-request-id"] == "run-7"
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["referrer-policy"] == "same-origin"
            policy = reply.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; ")
            assert "unsafe" not in policy
        made = {
            client.get(path, headers={"X-Request-ID": given}).headers["x-request-id"] for given in ("", "a b", "x" * 65)
        }
        assert len(made) == 3
        assert not made & {"", "a b"}

    def test_a_kept_answer_is_the_same_response(self, client: TestClient, sqlite: Database) -> None:
        with sqlite.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
        first, second = (client.get(ONE) for _ in range(2))
        assert client.app.state.answer_book._state.replies  # type: ignore[attr-defined]
        assert first.content == second.content
        drop = {"x-request-id", "vary", "content-encoding", "content-length"}
        kept = [{name: value for name, value in reply.headers.items() if name not in drop} for reply in (first, second)]
        assert kept[0] == kept[1]
        again = client.get(ONE, headers={"If-None-Match": second.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_metrics_count_lookups_requests_jobs_and_demand(client: TestClient, sqlite: Database) -> None:
    with sqlite.write() as session:
        AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
    for _ in range(3):
        client.get(ONE)
    client.get(f"/v1/answers/{DEVICE}/inference.fp16.b1.h1.kv1.q64.k64.d64")
    client.post("/v1/answers", json={"device": DEVICE, "problems": [PROBLEM.key] * 5})
    client.post("/v1/jobs", json=JOB)
    client.post("/v1/usage", json={**USAGE, "uses": [{"problem": PROBLEM.key, "match": "default", "calls": 7}]})
    text = client.get("/metrics").text
    for line in (
        'tilewise_lookups_total{match="exact"} 8.0',
        'tilewise_lookups_total{match="default"} 1.0',
        'tilewise_requests_total{method="GET",route="/v1/answers/{device_key}/{problem_key}",status="200"} 4.0',
        'tilewise_requests_total{method="POST",route="/v1/jobs",status="201"} 1.0',
        'tilewise_request_seconds_count{route="/v1/answers/{device_key}/{problem_key}"} 4.0',
        'tilewise_jobs{state="queued"} 1.0',
        'tilewise_demand_calls_total{match="default"} 7.0',
    ):
        assert line in text


def test_changes_and_mistakes_are_logged_as_json(
    client: TestClient, sqlite: Database, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "tilewise.api.request")
    headers = token(sqlite, Scope.ADMIN)
    client.get(ONE, headers=headers)
    client.post("/v1/jobs", json=JOB, headers={**headers, "X-Request-ID": "run-7"})
    (record,) = [record for record in caplog.records if record.name == "tilewise.api.request"]
    line = json.loads(JsonLines().format(record))
    assert {name: line[name] for name in ("request_id", "caller", "method", "path", "status", "level")} == {
        "request_id": "run-7", "caller": "test", "method": "POST", "path": "/v1/jobs", "status": 201, "level": "info",
    }  # fmt: skip
    assert headers["Authorization"] not in caplog.text


def test_a_signing_key_that_is_none_is_refused(sqlite: Database) -> None:
    with pytest.raises(SettingsError, match="signing key: expected 32 bytes in base64"):
        create_app(sqlite, ServiceSettings(signing_key="abc"))
