"""A service that wants tokens: signing in to look, acting with a token, and what a token may not do."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.tokens import AuditRepository, TokenRepository
from tilewise.domain.token import Scope

from . import chrome, filled
from .conftest import Open
from .service import Site
from .test_jobs import JOB


@dataclass(frozen=True)
class Guarded:
    """A service with a token of each kind; `database` is its own."""

    site: Site
    database: Database
    tokens: dict[Scope, str]


@pytest.fixture
def guarded(measured: Path, tmp_path: Path) -> Iterator[Guarded]:
    file = tmp_path / "tilewise.db"
    shutil.copy(measured, file)
    site = Site(file)
    with Database.open(site.database_url, upgrade=False) as database:
        with database.write() as session:
            made = {
                scope: TokenRepository(session).create(f"the {scope}", (Scope.READ, scope))[1]
                for scope in (Scope.READ, Scope.TUNE, Scope.ADMIN)
            }
        site.start()
        yield Guarded(site, database, made)
        site.close()


def sign_in(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Sign in").click()


def test_a_person_signs_in_looks_and_signs_out(opened: Open, guarded: Guarded) -> None:
    page = opened(guarded.site, "/problems?sort=-speedup", expected={401})
    assert chrome.serious(page) == []
    sign_in(page, "tw_0123456789abcdef_" + "A" * 43)
    expect(page.get_by_role("alert")).to_contain_text("No token that stands")
    sign_in(page, guarded.tokens[Scope.READ])
    page.wait_for_url("**/problems?sort=-speedup")  # where one wanted to
    expect(page.locator(".who")).to_contain_text("the read")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    assert guarded.tokens[Scope.READ] not in cookie["value"]
    assert page.evaluate("document.cookie") == ""
    page.goto("/compare/backends")
    chrome.settled(page)  # what the page fetches is let in, too
    page.get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/sign-in")
    assert page.context.cookies() == []
    assert page.evaluate("sessionStorage.length") == 0
    page.goto("/jobs")
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()


def test_a_session_only_looks_and_ends_with_its_token(opened: Open, guarded: Guarded) -> None:
    page = opened(guarded.site, "/sign-in", expected={401})
    sign_in(page, guarded.tokens[Scope.ADMIN])
    expect(page.locator(".who")).to_contain_text("the admin")
    ask = """([method, path]) =>
        fetch(path, {method, body: '{}', headers: {'Content-Type': 'application/json'}}).then(reply => reply.status)"""
    for method, path in (("POST", "/v1/snapshots"), ("POST", "/v1/tokens"), ("DELETE", "/v1/jobs/abc")):
        assert page.evaluate(ask, [method, path]) == 401
    with guarded.database.write() as session:
        for token in TokenRepository(session).all():
            TokenRepository(session).revoke(token.id)
    asked = page.get_by_role("heading", name="Sign in")
    chrome.until(page, lambda: page.goto("/devices") is not None and asked.is_visible())  # the service follows


def test_what_a_token_lacks_is_said_and_another_may_be_used(opened: Open, guarded: Guarded) -> None:
    page = opened(guarded.site, "/sign-in", expected={401, 403})
    sign_in(page, guarded.tokens[Scope.READ])
    page.goto("/tokens")
    expect(page.locator("main")).to_contain_text("lacks the scope 'admin'")
    assert chrome.serious(page) == []
    page.goto(f"/jobs/new?problem={filled.TUNED.key}&device={filled.H200}")
    expect(page.locator("main")).to_contain_text("tune, which the one you signed in with lacks")
    page.get_by_role("button", name="Queue it").click()
    expect(page.locator(".form-state")).to_contain_text("lacks the scope 'tune'")
    page.get_by_role("button", name="Use another token").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_label("Token")).to_be_focused()
    assert chrome.serious(page) == []
    page.keyboard.type("mistyped")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("does not stand")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    page.get_by_role("button", name="Queue it").click()
    expect(dialog).to_be_visible()  # nothing is kept of what was mistyped
    page.keyboard.type(guarded.tokens[Scope.TUNE])
    page.keyboard.press("Enter")
    page.wait_for_url(JOB)
    with guarded.database.read() as session:
        assert AuditRepository(session).page(limit=1).items[0].actor == "the tune"
        (newest,) = JobRepository(session).page(limit=1).items
    assert newest.job.problem == filled.TUNED


def test_tokens_are_made_shown_once_and_revoked(opened: Open, guarded: Guarded) -> None:
    page = opened(guarded.site, "/tokens", expected={401})
    sign_in(page, guarded.tokens[Scope.ADMIN])
    page.wait_for_url("**/tokens")
    page.get_by_label("Whose it is").fill("ci <b>bold</b>")
    page.get_by_label("report").check()
    page.get_by_label("Ends after").fill("90")
    page.get_by_role("button", name="Make it").click()
    shown = page.locator("#new-token")
    expect(shown).to_contain_text("ci <b>bold</b>")
    secret = shown.locator("code").inner_text()
    assert secret.startswith("tw_")
    assert chrome.serious(page) == []
    page.get_by_role("link", name="Show it in the list").click()
    expect(page.get_by_text(secret)).to_have_count(0)
    row = page.get_by_role("row").filter(has_text="ci <b>bold</b>").first
    expect(row).to_contain_text("read, report")
    with guarded.database.read() as session:
        made = TokenRepository(session).all()[-1]
    assert made.expires is not None
    assert round((made.expires - made.created) / timedelta(days=1)) == 90
    page.on("dialog", lambda dialog: dialog.accept())
    row.get_by_role("button", name="Revoke").click()
    expect(row).to_contain_text("revoked")
    expect(page.locator("#trail ~ .frame")).to_contain_text("token.revoke")


def test_snapshots_are_frozen_promoted_compared_and_rolled_back(opened: Open, site: Site) -> None:
    page = opened(site, "/snapshots")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Why").and_(page.locator("[name=note]")).fill("a second look")
    page.locator("[name=device]").select_option(filled.H200)
    page.get_by_role("button", name="Freeze").click()
    page.wait_for_url("**/snapshots/*")
    expect(page.locator("main")).to_contain_text("pretraining")  # equal answers: the snapshot that clients run
    page.goto("/snapshots")
    point = page.locator("section").filter(has_text="Let a channel point at one")
    point.get_by_label("Channel").fill("canary")
    point.get_by_label("Snapshot").select_option(index=1)
    point.get_by_label("Why").fill("first in line")
    point.get_by_role("button", name="Move it").click()
    expect(page.get_by_role("heading", name="Channel canary")).to_be_visible()
    stable = page.locator("section").filter(has_text="Channel stable")
    stable.get_by_role("link", name="what changed").click()
    expect(page.locator("main")).to_contain_text("3 plans differ")
    page.go_back()
    before = stable.locator("p a").first.inner_text()
    stable.locator("summary").click()
    stable.get_by_label("Why").fill("slower at night")
    stable.get_by_role("button", name="Roll back").click()
    expect(stable.locator("tbody tr")).to_have_count(3)
    expect(stable).to_contain_text("slower at night")
    assert stable.locator("p a").first.inner_text() != before
