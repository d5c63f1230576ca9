"""The FastAPI application: what it is made of."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

import tilewise
from tilewise.db.session import Database
from tilewise.db.signature import Signer

from . import answers, assets, errors, health, jobs, lists, snapshots, tokens, usage
from .access import Callers
from .answer_book import AnswerBook
from .gate import Gate
from .metrics import Metrics
from .pages.final_book import FinalBook
from .pages.routes import ROUTERS
from .points import PointBook
from .settings import ServiceSettings


class Service(FastAPI):
    """A FastAPI behind a gate, whose OpenAPI document says that errors are problem+json.

    The gate stands before all of FastAPI: what is at hand as bytes goes out without what that costs a request.
    """

    gate: Gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate(scope, receive, send)

    async def behind_the_gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = errors.describe(super().openapi())
        return self.openapi_schema


def create_app(database: Database, settings: ServiceSettings | None = None) -> FastAPI:
    """Return the service over an open database, which stays the caller's to close.

    It refuses to start (DatabaseError, SchemaVersionError) on a database that it could not serve from, and
    (SettingsError) without plotly's package.
    """
    app = Service(
        title="tilewise",
        summary="Which attention kernel, with which tile sizes, is fastest on a device",
        version=tilewise.__version__,
        lifespan=_lifespan,
        # Their pages load scripts from another host.
        docs_url=None,
        redoc_url=None,
    )
    settings = settings or ServiceSettings()
    assets.assets()
    app.state.database = database
    app.state.answer_book = AnswerBook(database)
    app.state.callers = Callers(database, required=settings.require_tokens)
    app.state.points = PointBook()
    app.state.metrics = Metrics(database)
    app.state.final_book = FinalBook(database)
    app.state.signer = None if settings.signing_key is None else Signer(settings.signing_key)
    errors.install(app)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=1)
    app.gate = Gate(
        app.behind_the_gate,
        book=app.state.answer_book,
        callers=app.state.callers,
        metrics=app.state.metrics,
        settings=settings,
    )
    for module in (answers, jobs, snapshots, lists, usage, tokens, health, assets):
        app.include_router(module.router)
    for router in ROUTERS:
        app.include_router(router)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_in_threadpool(app.state.database.check)
    tables = (app.state.answer_book, app.state.callers)
    for table in tables:
        await run_in_threadpool(table.refresh)
        table.follower.start()
    yield
    for table in tables:
        await run_in_threadpool(table.follower.stop)
