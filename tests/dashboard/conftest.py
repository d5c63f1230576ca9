"""One browser for the folder, one service for what is only looked at, and one of its own for what changes things."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tilewise.db.session import Database

from . import chrome, filled
from .chrome import Watch
from .service import Site


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    # of the package, not of the session: as long as Playwright runs, no other event loop can in this thread
    with chrome.running() as found:
        yield found


@pytest.fixture(scope="package")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of real H200 trials, with jobs, snapshots and reports of use; to be copied, not changed."""
    file = tmp_path_factory.mktemp("measured") / "tilewise.db"
    filled.fill(f"sqlite:///{file}")
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return file


@pytest.fixture(scope="package")
def shared(measured: Path) -> Iterator[Site]:
    """A service without tokens over the measured database, for tests that only look."""
    site = Site(measured)
    site.start()
    yield site
    site.close()


@pytest.fixture(scope="package")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service over a database that holds nothing."""
    file = tmp_path_factory.mktemp("empty") / "tilewise.db"
    Database.open(f"sqlite:///{file}", upgrade=True).close()
    site = Site(file)
    site.start()
    yield site
    site.close()


@pytest.fixture
def site(measured: Path, tmp_path: Path) -> Iterator[Site]:
    """A service over a copy of the measured database, for tests that change something."""
    file = tmp_path / "tilewise.db"
    shutil.copy(measured, file)
    made = Site(file)
    made.start()
    yield made
    made.close()


Open = Callable[..., Page]


@pytest.fixture
def watches() -> list[Watch]:
    """The watches of this test's pages."""
    return []


@pytest.fixture
def opened(browser: Browser, watches: list[Watch], request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens a path of a site in a context of its own; the test fails if anything went wrong in a page that it opened.

    `dark`, `narrow` and other options of Playwright's contexts say how it looks; `expected` statuses are no mistakes.
    """
    for service in {"site", "guarded"} & set(request.fixturenames):
        request.getfixturevalue(service)  # so that it outlives the pages
    contexts = []

    def open_(
        site: Site,
        path: str,
        *,
        dark: bool = False,
        narrow: bool = False,
        expected: set[int] | None = None,
        **options: Any,
    ) -> Page:
        context = browser.new_context(
            base_url=site.url,
            viewport=chrome.NARROW if narrow else chrome.WIDE,  # type: ignore[arg-type]
            color_scheme="dark" if dark else "light",
            timezone_id="America/New_York",
            reduced_motion="reduce",
            **options,
        )
        context.set_default_timeout(10_000)
        contexts.append(context)
        watch = Watch(context, site.url)
        watch.expected |= expected or set()
        watches.append(watch)
        page = context.new_page()
        page.goto(path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [problem for watch in watches for problem in watch.found] == []
