"""Every page, as it comes: drawn, readable by all, wide and narrow, light and dark."""

from pathlib import Path

import pytest
from playwright.sync_api import expect

from tilewise.db.session import Database

from . import chrome, filled
from .conftest import Open
from .screenshots import PAGES
from .service import Site


@pytest.fixture(scope="package")
def paths(measured: Path) -> dict[str, str]:
    found = filled.found(f"sqlite:///{measured}")
    return {name: path.format(**found) for name, path in PAGES.items()}


@pytest.mark.parametrize("name", PAGES)
def test_everybody_can_use_it_at_any_width_in_any_light(
    opened: Open, shared: Site, paths: dict[str, str], name: str
) -> None:
    page = opened(shared, paths[name])
    chrome.settled(page)
    assert chrome.serious(page) == []
    assert chrome.overflow(page) == 0
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size(chrome.NARROW)  # type: ignore[arg-type]
    page.evaluate("new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    assert chrome.serious(page, rules=("color-contrast",)) == []  # other colours, the same elements
    assert chrome.overflow(page) == 0, chrome.too_wide(page)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 26)"
    page.set_viewport_size({"width": 1920, "height": 1080})
    assert chrome.overflow(page) == 0


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/problems", "Nothing has been tuned yet"),
        ("/compare", "Nothing was measured yet"),
        ("/compare/backends", "Nothing was measured yet"),
        ("/compare/devices", "There are no two devices to compare"),
        ("/compare/software", "There are no two versions to compare"),
        ("/jobs", "No job yet"),
        ("/devices", "No device yet"),
        ("/snapshots", "Nothing was frozen yet"),
        ("/snapshots/diff", "Two snapshots are wanted"),
        ("/demand", "No client has reported yet"),
        ("/tokens", "There is none"),
    ],
)
def test_an_empty_page_says_what_to_do(opened: Open, empty: Site, path: str, says: str) -> None:
    page = opened(empty, path)
    expect(page.locator("main")).to_contain_text(says)
    assert chrome.serious(page) == []


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/nothing", 404, "Not Found"),
        (f"/jobs/{'0' * 32}", 404, "no job"),
        (f"/snapshots/{'0' * 64}", 404, "no snapshot"),
        ("/snapshots/diff?before=never&after=was", 404, "no snapshot or channel"),
        ("/devices/NOT-A-KEY/software", 422, "not a device key"),
    ],
)
def test_what_is_not_there_is_a_page_that_says_so(
    opened: Open, shared: Site, path: str, status: int, says: str
) -> None:
    page = opened(shared, path, expected={status})
    expect(page.locator("main")).to_contain_text(says)
    expect(page.get_by_role("navigation", name="Pages")).to_be_visible()
    assert chrome.serious(page) == []


def test_a_page_can_be_walked_with_the_keyboard(opened: Open, shared: Site) -> None:
    page = opened(shared, "/compare/backends")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")  # the first link behind the head
    expect(page.get_by_role("link", name="Sizes")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_url("**/compare")
    # everything that can be clicked can be reached
    clickable = page.locator("a[href], button:enabled, select, input:not([type=hidden]), summary").count()
    reached = page.evaluate(
        "[...document.querySelectorAll('a[href], button, select, input, summary')].filter(e => e.tabIndex >= 0 "
        "&& !e.disabled && e.type !== 'hidden').length"
    )
    assert reached == clickable


def test_filters_are_in_the_url_and_back_goes_back(opened: Open, shared: Site) -> None:
    page = opened(shared, "/compare/backends")
    page.get_by_label("Pass").select_option("training")
    page.wait_for_url("**pass=training**")
    page.get_by_label("against").select_option("flex")
    page.wait_for_url("**b=flex**")
    expect(page.get_by_role("row").nth(1)).to_contain_text("training")
    page.go_back()
    expect(page.get_by_label("against")).not_to_have_value("flex")
    expect(page.get_by_label("Pass")).to_have_value("training")
    page.go_back()
    expect(page.get_by_label("Pass")).to_have_value("")
    page.goto("/jobs?state=failed")
    expect(page.get_by_label("State")).to_have_value("failed")
    assert page.locator("tbody .tag").all_inner_texts() == ["failed"] * 18
    page.goto("/jobs")
    page.get_by_role("link", name="Older ones").click()
    page.wait_for_url("**after=**")
    assert page.locator("tbody tr").count() == 10


def test_times_are_local_with_utc_beside_them(opened: Open, shared: Site, paths: dict[str, str]) -> None:
    page = opened(shared, paths["snapshot"])
    time = page.locator("dd time").first
    utc = time.get_attribute("datetime") or ""
    assert time.get_attribute("title") == f"{utc[:16].replace('T', ' ')} UTC"
    shown = time.inner_text()
    assert shown != utc[:16].replace("T", " ")  # the test's browser is in New York
    assert len(shown) == 16


def test_a_point_leads_to_its_problem(opened: Open, shared: Site) -> None:
    page = opened(shared, "/compare?size=hidden")
    chart = page.locator(".chart").first
    chart.locator(".main-svg").first.wait_for()
    chart.locator(".point").first.click(force=True)
    page.wait_for_url("**/problems/nvidia-h200.sm90.141g.700w/inference**")


def test_only_this_host_is_asked_and_the_chart_library_once(
    opened: Open, shared: Site, watches: list[chrome.Watch]
) -> None:
    page = opened(shared, "/compare")
    chrome.settled(page)
    page.goto("/compare/backends")
    chrome.settled(page)
    (watch,) = watches
    sizes = [size for url, size in watch.transferred() if "plotly" in url]
    assert sizes[0] < 2_000_000
    assert [size for size in sizes if size > 0] == sizes[:1]  # what comes from the browser's memory has no size


def _database(site: Site) -> Database:
    return Database.open(site.database_url, upgrade=False)


def test_a_quiet_notice_offers_what_is_new(opened: Open, site: Site) -> None:
    page = opened(site, "about:blank")
    page.clock.install()
    page.goto("/jobs")
    notice = page.locator(".news")
    expect(notice).to_be_hidden()
    page.evaluate("scrollTo(0, 400)")
    with _database(site) as database:
        filled.queue_one(database)
    page.clock.fast_forward(25_000)
    expect(notice).to_be_visible()
    assert page.evaluate("scrollY") == 400
    rows = page.locator("tbody tr").first.inner_text()
    page.get_by_role("button", name="Show it").click()
    expect(page.locator("tbody tr").first).not_to_have_text(rows)
