"""What every request passes: its id, who sent it, its limits, the metrics; and the answers that are at hand as bytes.

One ASGI application around FastAPI does all of it, because each further layer costs as much as answering.
"""

import itertools
import logging
import os
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tilewise.domain.token import Scope as Scopes

from .access import Caller, Callers, RefusedError, current_caller, needed
from .answer_book import AnswerBook, Reply
from .errors import problem, wants_page
from .limits import RateLimit
from .metrics import Metrics
from .pages import sign_in
from .security import HEADERS
from .settings import ServiceSettings

ANSWER_ROUTE = "/v1/answers/{device_key}/{problem_key}"
ALL_ROUTE = "/v1/answers/{device_key}"
_GZIP = [(b"vary", b"Accept-Encoding"), (b"content-encoding", b"gzip")]
_SECURITY = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
_SECURITY_NAMES = frozenset(name for name, _ in _SECURITY)
_JSON_AND_SECURITY = [(b"content-type", b"application/json"), (b"cache-control", b"no-cache"), *_SECURITY]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HOST = re.compile(rb"(\[[0-9a-fA-F:.]+\]|[0-9.]+|[A-Za-z0-9-]+)(:\d+)?")
_log = logging.getLogger("tilewise.api.request")
# Request ids: random per process, then counted.
_PROCESS = os.urandom(6).hex().encode()
_count = itertools.count(1)
_CHANGES = (Scopes.TUNE, Scopes.ADMIN)
Headers = dict[bytes, bytes]
Respond = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    def __init__(
        self, app: ASGIApp, *, book: AnswerBook, callers: Callers, metrics: Metrics, settings: ServiceSettings
    ) -> None:
        self._app, self._book, self._callers, self._metrics = app, book, callers, metrics
        self._limit = RateLimit(settings.rate, settings.burst)
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        headers: Headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if given and _REQUEST_ID.fullmatch(given) else b"%s-%d" % (_PROCESS, next(_count))
        method, path = scope["method"], scope["path"]
        outcome, wanted, route = _Outcome(request_id), needed(method, path), "other"
        caller, refusal = self._admit(scope, headers, wanted)
        try:
            reply = None
            if refusal is None and method == "GET" and path.startswith("/v1/answers/"):
                reply = self._book.reply(self._book.key_of(scope, headers.get(b"accept-encoding", b"")))
            if reply is not None and headers.get(b"if-none-match") in (None, reply.etag):
                route = ANSWER_ROUTE if reply.match else ALL_ROUTE
                await self._send(reply, send, outcome, same=b"if-none-match" in headers)
            else:
                await self._pass_on(scope, receive, send, outcome, caller, refusal)
                route = getattr(scope.get("route"), "path", "other")
        finally:
            seconds = time.perf_counter() - start
            self._metrics.request(method, route, outcome.status, seconds)
            if self._settings.access_log or outcome.status >= 500 or wanted in _CHANGES:
                self._write(scope, outcome, caller, seconds)

    async def _pass_on(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        outcome: "_Outcome",
        caller: Caller | None,
        refusal: Respond | None,
    ) -> None:
        """Let FastAPI answer, or refuse, and what of the body is too large in any case."""
        scope.setdefault("state", {}).update(request_id=outcome.request_id.decode(), caller=caller)
        body = _Body(receive, self._settings.max_body)
        await (refusal or self._app)(scope, body.receive, outcome.watch(send, body))
        if body.too_large and not outcome.started:
            body.too_large = False
            await _too_large(scope, self._settings.max_body)(scope, receive, outcome.watch(send, body))

    def _admit(
        self, scope: Scope, headers: Headers, scope_needed: Scopes | None
    ) -> tuple[Caller | None, Respond | None]:
        """Return who asks and None, or a response that refuses the request."""
        method = scope["method"]
        address = scope["client"][0] if scope.get("client") else "unknown"
        if scope_needed is None:
            caller = Caller(f"anonymous@{address}", address, None)
        else:
            try:
                caller = self._callers.identify(
                    headers.get(b"authorization"),
                    address,
                    looks=method in ("GET", "HEAD"),
                    cookies=headers.get(b"cookie"),
                )
            except RefusedError:
                # refused ones count too, or secrets could be tried without end
                wait = self._limit.wait(f"refused {address}")
                return None, _too_many(scope, wait) if wait else _unauthorized(scope)
            current_caller.set(caller)
            if not caller.allows(scope_needed):
                detail = f"this token lacks the scope '{scope_needed}'; ask for one that has it"
                return caller, problem(scope, 403, "forbidden", detail)
            if caller.token is None and not self._settings.any_host and not _HOST.fullmatch(headers.get(b"host", b"")):
                detail = "without a token this service is asked by its address, not by a name of another domain"
                return caller, problem(scope, 403, "forbidden", detail)
        wait = self._limit.wait(caller.key)
        if wait:
            return caller, _too_many(scope, wait)
        length = headers.get(b"content-length")
        if length is None or (length.isdigit() and len(length) < 19 and int(length) <= self._settings.max_body):
            return caller, None
        return caller, _too_large(scope, self._settings.max_body)

    async def _send(self, reply: Reply, send: Send, outcome: "_Outcome", *, same: bool) -> None:
        if reply.match:
            self._metrics.lookup(reply.match)
        outcome.status = 304 if same else 200
        own = [(b"etag", reply.etag), (b"x-request-id", outcome.request_id)]
        if not same:
            own.append((b"content-length", b"%d" % len(reply.body)))
        if reply.gzipped:
            own += _GZIP if not same else _GZIP[:1]
        await send({"type": "http.response.start", "status": outcome.status, "headers": own + _JSON_AND_SECURITY})
        await send({"type": "http.response.body", "body": b"" if same else reply.body})

    def _write(self, scope: Scope, outcome: "_Outcome", caller: Caller | None, seconds: float) -> None:
        extra: dict[str, Any] = {
            "request_id": outcome.request_id.decode(),
            "caller": caller.name if caller else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": outcome.status,
            "ms": round(seconds * 1e3, 3),
        }
        _log.info("%s %s", scope["method"], scope["path"], extra=extra)


class _Outcome:
    """What went out: the status, and whether anything did."""

    def __init__(self, request_id: bytes) -> None:
        self.request_id, self.status, self.started = request_id, 500, False

    def watch(self, send: Send, body: "_Body") -> Send:
        """Return `send` with the headers that every response has; what is made of a part of a body is not sent."""

        async def sending(message: Message) -> None:
            if body.too_large and not self.started:
                return
            if message["type"] == "http.response.start":
                self.status, self.started = message["status"], True
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in _SECURITY_NAMES]
                message["headers"] = [*kept, *_SECURITY, (b"x-request-id", self.request_id)]
            await send(message)

        return sending


class _Body:
    """Counts a body that does not say how long it is, and ends it where it is too large."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self._left = receive, most
        self.too_large = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                self.too_large = True
                return {"type": "http.request", "body": b"", "more_body": False}
        return message


def _unauthorized(scope: Scope) -> Respond:
    if wants_page(scope):
        return sign_in.form(sign_in.place(scope), status=401)
    # curl and the like know Basic: the password is the token
    basic = 'Basic realm="tilewise: a token as the password", charset="UTF-8"'
    challenge = 'Bearer realm="tilewise"' if scope["path"].startswith("/v1/") else basic
    detail = "send a token that stands: Authorization: Bearer tw_...; `tilewise tokens create` makes one"
    return problem(scope, 401, "unauthorized", detail, headers={"WWW-Authenticate": challenge})


def _too_many(scope: Scope, wait: float) -> Respond:
    headers = {"Retry-After": str(int(wait) + 1)}
    return problem(scope, 429, "too-many-requests", f"too many requests: try again in {wait:.1f} s", headers=headers)


def _too_large(scope: Scope, most: int) -> Respond:
    # the rest of the body is still on its way: the connection cannot be used again
    headers = {"Connection": "close"}
    return problem(scope, 413, "content-too-large", f"the body has more than {most} bytes", headers=headers)
