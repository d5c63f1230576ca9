"""The harness itself: what it must not let pass."""

import pytest
from playwright.sync_api import Browser

from . import chrome
from .chrome import Watch
from .service import Site


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("console.error('broken')", "console error: broken"),
        ("setTimeout(() => { throw new Error('broken') })", "uncaught: broken"),
        ("new Image().src = '/nothing.png'", "404 of GET"),
        ("location.href = 'http://127.0.0.1:9/'", "a request to another host: http://127.0.0.1:9/"),
        (
            "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))",
            "Content Security Policy",
        ),
    ],
)
def test_it_sees_what_goes_wrong(browser: Browser, shared: Site, script: str, found: str) -> None:
    context = browser.new_context(base_url=shared.url)
    watch = Watch(context, shared.url)
    page = context.new_page()
    page.goto("/")
    assert watch.found == []
    page.evaluate(f"() => {{ {script} }}")
    chrome.until(page, lambda: bool(watch.found))
    context.close()
    assert any(found in each for each in watch.found), watch.found


def test_axe_finds_what_a_screen_reader_cannot_use(browser: Browser, shared: Site) -> None:
    page = browser.new_page(base_url=shared.url)
    page.goto("/")
    assert chrome.serious(page) == []
    page.evaluate("document.body.append(document.createElement('input'))")
    (found,) = chrome.serious(page)
    page.close()
    assert found.startswith("critical label:")


def test_width_is_measured(browser: Browser, shared: Site) -> None:
    page = browser.new_page(base_url=shared.url, viewport={"width": 390, "height": 844})
    page.goto("/")
    assert chrome.overflow(page) == 0
    page.evaluate("document.body.style.width = '500px'")
    assert chrome.overflow(page) > 0
    page.close()
