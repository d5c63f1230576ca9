"""Every error as RFC 9457 problem+json with a stable `type`, and to a browser at the dashboard as a page; one function
renders them all."""

import http
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from tilewise.domain.errors import (
    ConflictError,
    DatabaseError,
    DeviceError,
    NotFoundError,
    ProblemError,
    SettingsError,
    TilewiseError,
)

from .pages import templating

MEDIA_TYPE = "application/problem+json"
_log = logging.getLogger("tilewise.api")


class ProblemDetails(BaseModel):
    """What went wrong (RFC 9457). Programs branch on `type`; `detail` is for people."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:tilewise:error:invalid-parameter",
                "title": "A parameter does not make sense",
                "status": 422,
                "detail": "heads must be a multiple of kv_heads, got heads=8 and kv_heads=3; use a kv_heads that ...",
                "field": "problem_key",
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str
    field: str | None = Field(default=None, description="The parameter that does not make sense.")


class ParameterError(TilewiseError):
    """A parameter of a request that does not make sense; `field` is its name."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(detail)
        self.field = field


_TITLES = {
    "invalid-parameter": "A parameter does not make sense",
    "database-unavailable": "The database cannot be used",
    "internal-error": "The service made a mistake",
}
# What to do about it, for people at the dashboard.
_ADVICE = {
    403: "Sign in with a token that has the scope; whoever runs this service makes it: tilewise tokens create",
    404: "It may have been renamed, or never tuned. Search the problems for it.",
    429: "Wait a moment, then load the page again.",
    503: "Load the page again in a moment. Training jobs go on with the answers that they hold.",
}


def install(app: FastAPI) -> None:
    """Make `app` answer every error, its own mistakes included, as problem+json."""
    for kind in (TilewiseError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, render)


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the OpenAPI description of the errors that a route may answer with."""
    return {status: {"model": ProblemDetails, "description": http.HTTPStatus(status).phrase} for status in statuses}


# What the gate may answer before a route is asked.
_AT_THE_GATE = (401, 403, 413, 429)


def describe(document: dict[str, Any]) -> dict[str, Any]:
    """Give the errors in an OpenAPI document their media type (FastAPI knows one for all answers of a route), and every
    route those of the gate, with the token that it wants."""
    schema = {"$ref": "#/components/schemas/ProblemDetails"}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            at_the_gate = (429,) if path in ("/healthz", "/readyz") else _AT_THE_GATE
            # a body that is no text at all is refused before it is looked at
            for status in at_the_gate if "requestBody" not in operation else (400, *at_the_gate):
                content = {MEDIA_TYPE: {"schema": schema}}
                found = {"description": http.HTTPStatus(status).phrase, "content": content}
                operation["responses"].setdefault(str(status), found)
            for status, response in operation["responses"].items():
                if int(status) >= 400 and "application/json" in response["content"]:
                    response["content"] = {MEDIA_TYPE: response["content"]["application/json"]}
            if at_the_gate is _AT_THE_GATE:
                operation["security"] = [{"token": []}, {}]
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return document


async def render(request: Request, error: Exception) -> Response:
    """Return the response that tells of `error`."""
    status, name, detail, field = _describe(error)
    return problem(request.scope, status, name, detail, field, headers=getattr(error, "headers", None))


def problem(
    scope: Scope,
    status: int,
    name: str,
    detail: str,
    field: str | None = None,
    *,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a response that tells of an error: a page for a browser that asked for one, else problem+json."""
    title = _TITLES.get(name) or http.HTTPStatus(status).phrase
    if wants_page(scope):
        made = templating.page(
            "error.html", path="", status=status, code=status, title=title, detail=detail, advice=_ADVICE.get(status)
        )
        made.headers.update(headers or {})
        return made
    document: dict[str, object] = {
        "type": f"urn:tilewise:error:{name}",
        "title": title,
        "status": status,
        "detail": detail,
    }
    if field is not None:
        document["field"] = field
    return JSONResponse(document, status_code=status, headers=dict(headers or {}), media_type=MEDIA_TYPE)


def wants_page(scope: Scope) -> bool:
    """Return whether a browser asked for a page of the dashboard."""
    if scope["path"].startswith("/v1/"):
        return False
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _describe(error: Exception) -> tuple[int, str, str, str | None]:
    match error:
        case ParameterError():
            return 422, "invalid-parameter", str(error), error.field
        case ProblemError() | DeviceError() | SettingsError():
            return 422, "invalid-parameter", str(error), None
        case NotFoundError():
            return 404, "not-found", str(error), None
        case ConflictError():
            return 409, "conflict", str(error), None
        case RequestValidationError():
            first = error.errors()[0]
            return 422, "invalid-parameter", first["msg"], ".".join(str(part) for part in first["loc"][1:]) or None
        case DatabaseError():
            _log.error("%s", error)
            # The message names hosts and files: for the log, not for whoever asks.
            return 503, "database-unavailable", "the service cannot use its database; its log says why", None
        case HTTPException():
            phrase = http.HTTPStatus(error.status_code).phrase
            return error.status_code, phrase.lower().replace(" ", "-"), error.detail, None
    return 500, "internal-error", "the service's log says more", None
