"""Is the process alive, and can it serve?"""

from fastapi import APIRouter
from starlette.responses import Response

from .dependencies import DatabaseOfApp, MetricsOfApp
from .errors import responses
from .schemas import Health

router = APIRouter(tags=["health"])


@router.get("/healthz", responses=responses(500), summary="The process is alive")
async def healthz() -> Health:
    """Touches nothing else: a database that is away is no reason to restart the service."""
    return Health()


@router.get("/readyz", responses=responses(500, 503), summary="The service can answer")
def readyz(database: DatabaseOfApp) -> Health:
    """The database is reachable and has the schema that this version of the service needs."""
    database.check()
    return Health()


@router.get("/metrics", response_class=Response, responses=responses(500), summary="Prometheus metrics")
def metrics(found: MetricsOfApp) -> Response:
    """Lookups by match, requests and their latency, jobs by state, calls that clients reported."""
    return Response(found.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
