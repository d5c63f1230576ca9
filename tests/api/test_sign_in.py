"""Sessions of browsers: what they stand for, what they are good for, and who cannot make one."""

from datetime import timedelta

import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM

from tilewise.api import browser_session
from tilewise.db.session import Database
from tilewise.db.tokens import TokenRepository
from tilewise.domain.token import Scope, Token
from tilewise.domain.trial import now

JOB = {"problem": PROBLEM.key, "device": DEVICE, "budget": "quick"}
PAGE = {"Accept": "text/html"}


@pytest.fixture
def made(sqlite: Database) -> tuple[Token, str]:
    with sqlite.write() as session:
        return TokenRepository(session).create("somebody", (Scope.ADMIN,))


def sign_in(client: TestClient, secret: str, **headers: str) -> int:
    return client.post(
        "/sign-in", data={"token": secret, "next": "/jobs?state=failed"}, headers=headers, follow_redirects=False
    ).status_code


def test_a_session_looks_and_changes_nothing(client: TestClient, made: tuple[Token, str]) -> None:
    assert sign_in(client, made[1]) == 303
    assert client.get("/jobs", headers=PAGE).status_code == client.get("/v1/jobs").status_code == 200
    assert client.get("/tokens").headers["cache-control"] == "no-store"
    for method, path in (("POST", "/v1/jobs"), ("POST", "/v1/answers"), ("DELETE", "/v1/jobs/abc")):
        assert client.request(method, path, json=JOB).status_code == 401
    # a token that is sent goes first, right or wrong
    assert client.get("/v1/jobs", headers={"Authorization": "Bearer x"}).status_code == 401


def test_it_ends_with_its_token_and_by_itself(made: tuple[Token, str]) -> None:
    token, tokens, moment = made[0], {made[0].id: made[0]}, now()
    cookie = f"a=b; {browser_session.NAME}={browser_session.opened(token, moment)}".encode()
    assert browser_session.token_of(cookie, tokens, moment) == token
    assert browser_session.token_of(cookie, {}, moment) is None
    almost, over = (moment + browser_session.LENGTH + timedelta(seconds=each) for each in (-2, 2))
    assert browser_session.token_of(cookie, tokens, almost) == token
    assert browser_session.token_of(cookie, tokens, over) is None


def test_nobody_makes_one_without_the_token(client: TestClient, made: tuple[Token, str]) -> None:
    token, moment = made[0], now()
    right = browser_session.opened(token, moment)
    id_, ends, mac = right.split(".")
    later = int(ends) + 3600
    for wrong in (
        f"{id_}.{later}.{mac}",
        f"{'0' * 16}.{ends}.{mac}",
        f"{id_}.{ends}.{'0' * 64}",
        "",
        right[:-1],
        "a;=\x01",
    ):
        cookie = f"{browser_session.NAME}={wrong}".encode()
        assert browser_session.token_of(cookie, {token.id: token}, moment) is None
        assert client.get("/jobs", headers={"Cookie": f"{browser_session.NAME}={wrong}"}).status_code == 401
    for secret in ("", made[1][:-1], "tw_x", "x" * 5000):
        assert sign_in(client, secret) == 401
    assert not client.cookies


def test_another_site_signs_nobody_in_or_out(client: TestClient, made: tuple[Token, str]) -> None:
    for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert sign_in(client, made[1], **headers) == 403
    assert not client.cookies
    assert sign_in(client, made[1], Origin="http://testserver") == 303
    client.post("/sign-out", headers={"Origin": "https://evil.example"})
    assert client.cookies
    client.post("/sign-out")
    assert not client.cookies


@pytest.mark.parametrize(
    ("wanted", "place"),
    [
        ("/jobs?state=failed", "/jobs?state=failed"),
        ("https://evil.example/", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("/a\\b", "/"),
        ("/x\r\nSet-Cookie: a=b", "/"),
        ("javascript:alert(1)", "/"),
        ("/sign-in", "/"),
        ("/v1/jobs", "/"),
        ("", "/"),
    ],
)
def test_nobody_is_sent_to_another_site(client: TestClient, made: tuple[Token, str], wanted: str, place: str) -> None:
    reply = client.post("/sign-in", data={"token": made[1], "next": wanted}, follow_redirects=False)
    assert (reply.status_code, reply.headers["location"]) == (303, place)


def test_a_browser_is_asked_and_comes_back_to_where_it_was(client: TestClient, made: tuple[Token, str]) -> None:
    reply = client.get("/problems?q=%3Cb%3E%22", headers=PAGE)
    assert reply.status_code == 401
    assert "www-authenticate" not in reply.headers  # no dialog of the browser's own
    assert 'value="/problems?q=%3Cb%3E%22"' in reply.text
    sent = client.post("/sign-in", data={"token": made[1], "next": "/problems?q=%3Cb%3E%22"}, follow_redirects=False)
    assert sent.headers["location"] == "/problems?q=%3Cb%3E%22"
    cookie = sent.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=lax" in cookie
    assert "secure" not in cookie
    secure = TestClient(client.app, base_url="https://testserver")
    assert (
        "secure"
        in secure.post("/sign-in", data={"token": made[1]}, follow_redirects=False).headers["set-cookie"].lower()
    )


def test_without_tokens_nobody_needs_to(client: TestClient) -> None:
    assert client.get("/jobs", headers=PAGE).status_code == 200
    reply = client.post("/sign-in", data={"token": "any"}, follow_redirects=False)
    assert (reply.status_code, "set-cookie" in reply.headers) == (303, False)
