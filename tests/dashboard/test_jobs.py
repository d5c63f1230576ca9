"""A job from the form to its end, as somebody sees it who keeps the page open."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect

from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.domain.config import Candidate
from tilewise.domain.job import JobState

from . import chrome, filled
from .chrome import Watch
from .conftest import Open
from .service import Site

JOB = re.compile(r"/jobs/[0-9a-f]{32}$")


@pytest.fixture
def database(site: Site) -> Iterator[Database]:
    with Database.open(site.database_url, upgrade=False) as opened:
        yield opened


def begun(database: Database) -> tuple[str, int]:
    """Return the id and the attempt of a job that runs."""
    job = filled.queue_one(database)
    with database.write() as session:
        attempt = JobRepository(session).start(job)
    assert attempt is not None
    return job, attempt


def go_on(database: Database, job: str, attempt: int, share: float) -> None:
    with database.write() as session:
        assert JobRepository(session).progress(
            job, attempt, progress=share, message=f"at {share:.0%}", best=Candidate("flex"), best_ms=share
        )


def test_a_job_is_asked_for_with_the_keyboard(opened: Open, site: Site, database: Database) -> None:
    page = opened(site, f"/jobs/new?device={filled.H200}", expected={422})
    page.get_by_label("Problem").focus()
    page.keyboard.type("inference.fp16.b1.h64")
    page.keyboard.press("Enter")
    expect(page.locator(".form-state")).to_contain_text("not a problem key")
    expect(page.get_by_label("Problem")).to_be_focused()
    assert page.get_by_label("Problem").get_attribute("aria-invalid") == "true"
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type(filled.TUNED.key)
    page.keyboard.press("Tab")
    expect(page.get_by_label("Device")).to_have_value(filled.H200)
    page.keyboard.press("Tab")
    page.keyboard.type("full")
    page.keyboard.press("Tab")
    page.keyboard.type("77")
    page.keyboard.press("Enter")
    page.wait_for_url(JOB)
    with database.read() as session:
        record = JobRepository(session).get(page.url.rpartition("/")[2])
    assert record is not None
    assert (record.job.problem, record.job.device_key) == (filled.TUNED, filled.H200)
    assert (record.job.budget.name, record.job.budget.trials) == ("full", 77)
    expect(page.locator(".state")).to_have_text("queued")


def test_a_job_is_seen_as_it_goes_on_and_over_a_restart(
    opened: Open, site: Site, database: Database, watches: list[Watch]
) -> None:
    job, attempt = begun(database)
    page = opened(site, f"/jobs/{job}")
    expect(page.locator(".live")).to_contain_text("Live")
    go_on(database, job, attempt, 0.25)
    expect(page.locator(".percent")).to_have_text("25 %")
    expect(page.locator(".best")).to_have_text("flex, 0.2500 ms")
    expect(page.locator("#log tr").first).to_contain_text("at 25%")
    assert chrome.serious(page) == []

    watches[0].away = True
    site.stop()
    expect(page.locator(".live")).to_contain_text("The service is away")
    go_on(database, job, attempt, 0.5)  # the worker needs no service
    site.start()
    expect(page.locator(".percent")).to_have_text("50 %", timeout=20_000)
    expect(page.locator(".live")).to_contain_text("Live")
    with database.write() as session:
        assert JobRepository(session).finish(job, attempt, JobState.SUCCEEDED, message="flex wins")
    expect(page.locator(".state")).to_have_text("succeeded")
    expect(page.get_by_role("button", name="Cancel the job")).to_have_count(0)
    # every event once, the newest first, the same after loading the page again
    said = page.locator("#log .why").all_inner_texts()
    assert said == ["flex wins", "at 50%", "at 25%", "", ""]
    page.reload()
    assert page.locator("#log .why").all_inner_texts() == said


def test_a_proxy_that_refuses_for_the_service_is_outwaited(opened: Open, site: Site, database: Database) -> None:
    job, attempt = begun(database)
    page = opened(site, "/jobs", expected={502})
    page.route("**/events?**", lambda route: route.fulfill(status=502, body="bad gateway"))
    page.goto(f"/jobs/{job}")
    expect(page.locator(".live")).to_contain_text("The service is away")
    page.unroute("**/events?**")
    go_on(database, job, attempt, 0.75)
    expect(page.locator(".percent")).to_have_text("75 %")


def test_a_job_is_cancelled_after_a_question(opened: Open, site: Site, database: Database) -> None:
    job, attempt = begun(database)
    page = opened(site, f"/jobs/{job}")
    answers = [False, True]
    page.on("dialog", lambda dialog: dialog.accept() if answers.pop(0) else dialog.dismiss())
    page.get_by_role("button", name="Cancel the job").click()
    assert answers == [True]
    expect(page.locator(".state")).to_have_text("running")
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.locator(".state")).to_have_text("cancelled")
    expect(page.locator("#log tr").first).to_contain_text("cancelled by anonymous")
    with database.write() as session:
        assert not JobRepository(session).progress(job, attempt, progress=1.0)


def test_demand_becomes_a_job(opened: Open, site: Site) -> None:
    page = opened(site, "/demand")
    row = page.locator("tbody tr").filter(has_text=filled.MISSED.key)
    expect(row).to_contain_text("its job waits or runs")
    page.locator("tbody tr").filter(has_text=filled.ALSO_MISSED.key).get_by_role("link", name="Tune it").click()
    expect(page.get_by_label("Problem")).to_have_value(filled.ALSO_MISSED.key)
    page.get_by_role("button", name="Queue it").click()
    page.wait_for_url(JOB)
    expect(page.locator("main")).to_contain_text(filled.ALSO_MISSED.key)
