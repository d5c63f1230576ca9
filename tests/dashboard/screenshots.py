"""Takes the pictures of docs/dashboard: `python -m tests.dashboard.screenshots docs/dashboard`.

Every page at 1440 pixels in light and at 390 in dark, over the database that the tests use.
"""

import io
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page

from tilewise.db.session import Database
from tilewise.db.tokens import TokenRepository
from tilewise.domain.token import Scope
from tilewise.domain.trial import now

from . import chrome, filled
from .service import Site

H200, TUNED = filled.H200, filled.TUNED.key
# name -> path; {job} and the like are filled in from the database
PAGES = {
    "overview": "/",
    "problems": "/problems?sort=-speedup",
    "problem": f"/problems/{H200}/{TUNED}",
    "trial": "/trials/{trial}",
    "compare-sizes": "/compare",
    "compare-backends": "/compare/backends?a=triton&b=flash_cute",
    "compare-devices": "/compare/devices",
    "compare-software": "/compare/software?backend=triton",
    "jobs": "/jobs",
    "job": "/jobs/{job}",
    "job-new": f"/jobs/new?problem={filled.MISSED.key}&device={H200}",
    "devices": "/devices",
    "software": f"/devices/{H200}/software",
    "snapshots": "/snapshots",
    "snapshot": "/snapshots/{snapshot}",
    "snapshot-diff": "/snapshots/diff?before={before}&after={snapshot}",
    "demand": "/demand",
    "tokens": "/tokens",
    "sign-in": "/sign-in",
}
HEIGHTS = {"wide": 1400, "narrow": 1600}  # pixels, at most


def take(browser: Browser, site: Site, folder: Path, names: list[str], token: str) -> None:
    """Write two pictures of each page to `folder`, as who has `token` sees it."""
    found = filled.found(site.database_url)
    for name in names:
        path = PAGES[name].format(**found)
        for kind, viewport, scheme in (("wide", chrome.WIDE, "light"), ("narrow", chrome.NARROW, "dark")):
            context = browser.new_context(
                base_url=site.url,
                viewport=viewport,  # type: ignore[arg-type]
                color_scheme=scheme,  # type: ignore[arg-type]
                extra_http_headers={"Authorization": f"Bearer {token}"},
            )
            page = context.new_page()
            page.goto(path)
            chrome.settled(page)
            _write(page, folder / f"{name}-{kind}.png", HEIGHTS[kind])
            context.close()


def _write(page: Page, path: Path, most: int) -> None:
    whole = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture = whole.crop((0, 0, whole.width, min(whole.height, most))).convert("RGB")
    # few colours: a third of the size, and hardly to be seen
    picture.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/dashboard")
    folder.mkdir(parents=True, exist_ok=True)
    names = sys.argv[2:] or list(PAGES)
    with tempfile.TemporaryDirectory() as data, chrome.running() as browser:
        site = Site(Path(data) / "tilewise.db")
        filled.fill(site.database_url)
        with Database.open(site.database_url, upgrade=False) as database, database.write() as session:
            tokens = TokenRepository(session)
            tokens.create("pretraining", (Scope.READ, Scope.REPORT))
            tokens.create("ci", (Scope.READ, Scope.TUNE), expires=now() + timedelta(days=90))
            token = tokens.create("release", (Scope.ADMIN,))[1]
        site.start()
        try:
            take(browser, site, folder, names, token)
        finally:
            site.close()


if __name__ == "__main__":
    main()
