"""The FastAPI application: what it is made of."""

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.staticfiles import StaticFiles

import tilewise
from tilewise.db.session import Database

from . import answers, dashboard, errors, health
from .answer_book import AnswerBook
from .security import SecurityHeaders


class Service(FastAPI):
    """A FastAPI whose OpenAPI document says that errors are problem+json."""

    def openapi(self) -> dict[str, Any]:
        return errors.describe(super().openapi())


def create_app(database: Database) -> FastAPI:
    """Return the service over an open database, which stays the caller's to close.

    It refuses to start (DatabaseError, SchemaVersionError) on a database that it could not serve from.
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
    app.state.database = database
    app.state.answer_book = AnswerBook(database)
    errors.install(app)
    app.add_middleware(GZipMiddleware, minimum_size=1000, compresslevel=6)
    app.add_middleware(SecurityHeaders)
    for router in (answers.router, health.router, dashboard.router):
        app.include_router(router)
    app.mount("/static", StaticFiles(directory=Path(__file__).with_name("static")), name="static")
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    await run_in_threadpool(app.state.database.check)
    yield
