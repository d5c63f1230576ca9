"""/static: the files of the dashboard, each under the hash of its content, so that a browser never asks twice.

Own files share one hash, because modules import one another by relative addresses. plotly's bundle is the one file
used of its Python package, which is never imported: that would take the service seconds.
"""

import functools
import gzip
import hashlib
import importlib.util
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tilewise.domain.errors import SettingsError

PLOTLY = "plotly.min.js"
_FOLDER = Path(__file__).with_name("static")
_IMMUTABLE = "public, max-age=31536000, immutable"
# Beside its own rules, which it adds through the CSSOM, plotly carries a map library that writes a style element unless
# one of its id is there. The policy forbids such an element, and the browser would say so at every page.
_GUARDED_STYLE = re.compile(rb'getElementById\("([0-9a-f]{64})"\)\)\{var \w+=document\.createElement\("style"\)')

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Asset:
    """A file and the address it is served at."""

    path: Path
    digest: str

    @property
    def url(self) -> str:
        return f"/static/{self.digest}/{self.path.name}"

    @property
    def media_type(self) -> str:
        return mimetypes.guess_type(self.path.name)[0] or "application/octet-stream"

    @functools.cached_property
    def content(self) -> bytes:
        return self.path.read_bytes()

    @functools.cached_property
    def gzipped(self) -> bytes:
        """The content, compressed when it is first asked for; 0.2 s for plotly's 5 MB."""
        return gzip.compress(self.content, 6, mtime=0)


@functools.cache
def assets() -> dict[str, Asset]:
    """Return all files by their name. Raises SettingsError where plotly is not installed."""
    own = sorted(path for path in _FOLDER.iterdir() if path.is_file())
    together = hashlib.sha256()
    for path in own:
        together.update(path.name.encode() + b"\0" + path.read_bytes())
    found = {path.name: Asset(path, together.hexdigest()[:16]) for path in own}
    plotly = _plotly()
    found[PLOTLY] = Asset(plotly, hashlib.sha256(plotly.read_bytes()).hexdigest()[:16])
    return found


def asset_url(name: str) -> str:
    """Return the address of a file in api/static, or of plotly's bundle."""
    return assets()[name].url


@functools.cache
def guarded_styles() -> tuple[str, ...]:
    """Return the ids of the style elements that plotly's bundle writes unless the page has elements of these ids."""
    return tuple(found.decode() for found in _GUARDED_STYLE.findall(assets()[PLOTLY].content))


@router.get("/static/{digest}/{name}")
def static(digest: str, name: str, request: Request) -> Response:
    """A file. Under an older hash (a page from before an upgrade) it is today's, and not kept."""
    asset = assets().get(name)
    if asset is None:
        raise HTTPException(404, f"no such file: {name}")
    current = digest == asset.digest
    headers = {
        "Cache-Control": _IMMUTABLE if current else "no-cache",
        "ETag": f'"{asset.digest}"',
        "Vary": "Accept-Encoding",
    }
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        headers["Content-Encoding"] = "gzip"
        return Response(asset.gzipped, headers=headers, media_type=asset.media_type)
    return Response(asset.content, headers=headers, media_type=asset.media_type)


def _plotly() -> Path:
    found = importlib.util.find_spec("plotly")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "package_data" / PLOTLY
        if path.is_file():
            return path
    raise SettingsError("the dashboard draws with plotly, which is not installed: pip install 'tilewise[server]'")
