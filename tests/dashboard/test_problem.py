"""One problem in a browser: its charts, its landscape, and the way from a point to its trial."""

import csv
from pathlib import Path

import pytest

from . import chrome
from .conftest import Open
from .filled import H200, TUNED
from .service import Site

PATH = f"/problems/{H200}/{TUNED.key}"
WINDOW = "training.fp16.b2.h16.kv16.q4096.k4096.d128.causal.window1024"


@pytest.mark.parametrize("dark", [False, True])
def test_every_chart_is_drawn_in_the_colours_of_the_page(opened: Open, shared: Site, dark: bool) -> None:
    page = opened(shared, PATH, dark=dark)
    charts = page.locator(".chart[data-chart]")
    assert charts.count() == 5
    for index in range(charts.count()):
        charts.nth(index).scroll_into_view_if_needed()
        charts.nth(index).locator(".main-svg").first.wait_for()
    bar = page.locator("[data-chart$='/charts/backends'] .bars path").first
    drawn = bar.evaluate("bar => getComputedStyle(bar).fill")
    variable = page.evaluate(
        """() => { const probe = document.createElement("i"); probe.className = "backend-flash-cute";
        document.body.append(probe); probe.style.color = "var(--own)"; return getComputedStyle(probe).color; }"""
    )
    assert drawn == variable


def test_a_chart_has_its_figures_as_a_table(opened: Open, shared: Site) -> None:
    page = opened(shared, PATH)
    page.get_by_text("Every finalist, with its config").click()
    table = page.get_by_role("region", name="Every finalist")
    assert table.get_by_role("row").count() > 6
    assert "the answer" in table.inner_text()


def test_a_point_of_the_course_says_what_it_is_and_leads_to_its_trial(opened: Open, shared: Site) -> None:
    page = opened(shared, PATH)
    chart = page.locator("[data-chart*='/charts/course']")
    chart.scroll_into_view_if_needed()
    point = chart.locator(".scatterlayer .points path").first
    point.wait_for()
    box = point.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    hover = chart.locator(".hoverlayer .hovertext")
    hover.wait_for()
    assert "trial " in (hover.text_content() or "")
    page.mouse.click(x, y)
    page.wait_for_url("**/trials/*")
    assert page.get_by_role("heading", name="What was run").is_visible()


def test_zooming_into_the_course_asks_for_the_stretch(opened: Open, shared: Site) -> None:
    page = opened(shared, PATH)
    chart = page.locator("[data-chart*='/charts/course']")
    chart.scroll_into_view_if_needed()
    area = chart.locator(".nsewdrag").first
    area.wait_for()
    box = area.bounding_box()
    assert box is not None
    middle = box["y"] + box["height"] / 2
    with page.expect_response(lambda reply: "charts/course" in reply.url and "from=" in reply.url):
        page.mouse.move(box["x"] + box["width"] * 0.3, middle)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=5)
        page.mouse.up()
    whole = chart.get_by_role("button", name="Show all")
    with page.expect_response(lambda reply: reply.url.endswith("charts/course")):
        whole.click()
    chrome.until(page, whole.is_hidden)


def test_the_axis_of_time_is_a_choice_in_the_url(opened: Open, shared: Site) -> None:
    page = opened(shared, PATH)
    page.get_by_role("link", name="linear").click()
    page.wait_for_url("**?axis=linear#course")
    assert page.locator(".switch [aria-current]").inner_text() == "linear"


def test_parameters_are_filters_and_a_cell_leads_to_its_trial_by_keyboard(opened: Open, shared: Site) -> None:
    page = opened(shared, f"/problems/{H200}/{WINDOW}")
    page.get_by_label("Kernel").select_option(index=0)
    page.wait_for_url("**space=**")
    every = page.locator(".heat td a").count()
    assert every > 2
    form = page.locator("form[action$='#landscape']")
    name = form.locator("select[name^='p.']").first.get_attribute("name")
    form.locator(f"select[name='{name}']").select_option(index=1)
    page.wait_for_url(f"**{name}=**")
    assert "show all" in page.locator("section", has=page.locator("#landscape")).inner_text()
    page.go_back()
    cell = page.locator(".heat td a").first
    cell.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/trials/*")


def test_a_command_is_copied(opened: Open, shared: Site) -> None:
    page = opened(shared, PATH, permissions=["clipboard-read", "clipboard-write"])
    command = page.locator("section", has=page.locator("#again")).locator(".command")
    command.get_by_role("button", name="Copy").click()
    command.get_by_role("button", name="Copied").wait_for()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == f"tilewise tune --problem {TUNED.key} --fresh"


def test_a_chart_that_cannot_come_says_so_and_comes_again(opened: Open, site: Site) -> None:
    page = opened(site, "/problems", expected={503})
    asked = []

    def refuse(route: object) -> None:
        asked.append(route)
        route.fulfill(status=503, content_type="application/problem+json", body='{"detail": "the database is away"}')  # type: ignore[attr-defined]

    page.route("**/charts/backends", refuse, times=1)
    page.goto(PATH)
    chart = page.locator("[data-chart$='/charts/backends']")
    chart.get_by_role("alert").wait_for()
    assert "the database is away" in chart.inner_text()
    chart.get_by_role("button", name="Try again").click()
    chart.locator(".main-svg").first.wait_for()
    assert len(asked) == 1


def test_the_list_is_exported_as_it_is_filtered(opened: Open, shared: Site, tmp_path: Path) -> None:
    page = opened(shared, "/problems?pass=training&sort=-speedup")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="CSV").click()
    file = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(file)
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == int(page.locator(".over p").first.inner_text().split()[0])
    assert all(row["problem"].startswith("training.") for row in rows)
    over = [float(row["speedup_over_torch"]) for row in rows]
    assert over == sorted(over, reverse=True)
