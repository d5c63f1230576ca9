"""/sign-in and /sign-out: how a person with a token looks at the dashboard of a service that wants one."""

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import APIRouter, Depends, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from tilewise.domain.trial import now

from .. import browser_session
from ..access import Callers, RefusedError
from .templating import page

MAX_FORM = 4000  # bytes
router = APIRouter(include_in_schema=False)


def form(place: str, *, status: int = 200, fault: str = "") -> HTMLResponse:
    """Return the page that asks for a token, and then goes to `place`."""
    return page("sign_in.html", path="", status=status, place=place, fault=fault)


def place(scope: Scope) -> str:
    """Return the path and query string that were asked for."""
    query = scope.get("query_string", b"").decode("latin-1")
    path: str = scope["path"]
    return path + (f"?{query}" if query else "")


def _callers(request: Request) -> Callers:
    found: Callers = request.app.state.callers
    return found


CallersOfApp = Annotated[Callers, Depends(_callers)]


@router.get("/sign-in")
def show(request: Request) -> HTMLResponse:
    """The form by itself."""
    return form(_inside(request.query_params.get("next", "")))


@router.post("/sign-in")
async def sign_in(request: Request, callers: CallersOfApp) -> Response:
    """Begin a session, and go to where one wanted to. Another site's form cannot do it in the name of its author."""
    body = await request.body()
    fields = parse_qs(body.decode("latin-1")) if len(body) <= MAX_FORM else {}
    wanted = _inside(fields.get("next", [""])[0])
    if not _from_here(request):
        return form(wanted, status=403, fault="That form was sent by another site. Type the token here.")
    try:
        authorization = b"Bearer " + fields.get("token", [""])[0].strip().encode()
        token = callers.identify(authorization, "").token
    except RefusedError:
        return form(wanted, status=401, fault="No token that stands: it is mistyped, has ended or was revoked.")
    reply = RedirectResponse(wanted, 303)
    if token is not None:
        reply.set_cookie(
            browser_session.NAME,
            browser_session.opened(token, now()),
            max_age=int(browser_session.LENGTH.total_seconds()),
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )
    return reply


@router.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """End the session of this browser."""
    reply = RedirectResponse("/sign-in", 303)
    if _from_here(request):
        reply.delete_cookie(browser_session.NAME, httponly=True, samesite="lax")
    return reply


def _inside(place: str) -> str:
    """Return `place` where it is one of this service: nobody is sent to another site from here."""
    parts = urlsplit(place)
    inside = place.startswith("/") and not place.startswith(("//", "/\\")) and not parts.netloc
    printable = place.isascii() and place.isprintable() and "\\" not in place
    return place if inside and printable and not parts.path.startswith(("/sign-", "/v1/")) else "/"


def _from_here(request: Request) -> bool:
    site = request.headers.get("sec-fetch-site", "same-origin")
    origin = request.headers.get("origin")
    here = origin is None or urlsplit(origin).netloc == request.headers.get("host")
    return here and site in ("same-origin", "none")
