"""Headless Chromium as the tests use it: nothing of it asks the network, and every page is watched."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Response, sync_playwright

FLAGS = (
    "--no-sandbox",  # tests run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1440, "height": 900}


@contextlib.contextmanager
def running() -> Iterator[Browser]:
    """A browser with a fresh profile, ended at the end. Debian's package is what `make test` installs."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    assert program, "the dashboard is tested in Chromium, and there is none: `apt-get install chromium`"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What went wrong in the pages of a context: errors in the console, requests to other hosts, refused requests.

    `expected` are statuses of 400 and above that a test asks for; the console tells of them too.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.expected: set[int] = set()
        self.away = False  # whether the service is stopped on purpose
        self._finished: list[Request] = []
        self._found: list[str] = []
        self._host = urlsplit(url).netloc
        context.on("console", self._console)
        context.on("weberror", lambda error: self._found.append(f"uncaught: {error.error}"))
        context.on("request", self._request)
        context.on("response", self._response)
        context.on("requestfailed", self._failed)
        context.on("requestfinished", lambda request: self._finished.append(request))

    @property
    def found(self) -> list[str]:
        return list(self._found)

    def transferred(self) -> list[tuple[str, int]]:
        """Return what came over the wire, and how many bytes of it."""
        return [(request.url, request.sizes()["responseBodySize"]) for request in self._finished]

    def _console(self, message: ConsoleMessage) -> None:
        refused = message.text.startswith("Failed to load resource")  # told by _response and _failed
        if message.type in ("error", "warning") and not refused:
            self._found.append(f"console {message.type}: {message.text}")

    def _request(self, request: Request) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != self._host:
            self._found.append(f"a request to another host: {request.url}")

    def _response(self, response: Response) -> None:
        if response.status >= 400 and response.status not in self.expected:
            self._found.append(f"{response.status} of {response.request.method} {response.url}")

    def _failed(self, request: Request) -> None:
        # a page that is left while it loads something gives that up
        if request.failure != "net::ERR_ABORTED" and not self.away:
            self._found.append(f"failed: {request.url}: {request.failure}")


def until(page: Page, true: Callable[[], bool], seconds: float = 10) -> None:
    """Let the page's events come in until something that they change is true; fails where that takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"still not so after {seconds} s"
        page.wait_for_timeout(20)


def settled(page: Page) -> None:
    """Return when every chart of the page is drawn, those further down too."""
    for chart in page.locator(".chart[data-chart]").all():
        chart.scroll_into_view_if_needed()
        chart.locator(".main-svg").first.wait_for()
    page.evaluate("scrollTo(0, 0)")


def serious(page: Page, *, rules: tuple[str, ...] = ()) -> list[str]:
    """Return what axe-core finds of serious and critical impact, by all of its rules or some, with the elements."""
    if not page.evaluate("typeof axe === 'object'"):
        page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text())
    options = json.dumps({"resultTypes": ["violations"], **({"runOnly": list(rules)} if rules else {})})
    found: dict[str, Any] = json.loads(page.evaluate(f"axe.run({options}).then(found => JSON.stringify(found))"))
    return [
        f"{each['impact']} {each['id']}: {each['help']}: {[node['target'] for node in each['nodes'][:5]]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]


def overflow(page: Page) -> int:
    """Return by how many pixels the page is wider than its window."""
    width: int = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    return width


def too_wide(page: Page) -> list[str]:
    """Return the elements that stick out of the window, for the message of a test that fails."""
    found: list[str] = page.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.tagName + '.' + e.className + ' ' + e.textContent.slice(0, 40))"
    )
    return found[:10]
