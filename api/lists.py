"""/v1/problems, /v1/devices, /v1/trials, /v1/demand: what there is, page by page."""

from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response

from tilewise.db.demand import DemandRepository
from tilewise.db.devices import DeviceRepository, ProblemRepository
from tilewise.db.tokens import AuditRepository
from tilewise.db.trials import TrialRepository, TrialSort
from tilewise.domain import codec
from tilewise.domain.problem import Dtype, Pass
from tilewise.domain.trial import Outcome

from . import documents
from .dependencies import DatabaseOfApp, OfDevice, OfProblem
from .errors import ParameterError, responses

router = APIRouter(prefix="/v1", tags=["lists"])
_errors = responses(422, 500, 503)


@router.get("/problems", response_model=documents.Listed[str], responses=_errors, summary="All problems")
def problems(
    database: DatabaseOfApp,
    q: documents.Search = "",
    pass_: Annotated[Pass | None, Query(alias="pass")] = None,
    dtype: Dtype | None = None,
    head_dim: Annotated[int | None, Query(ge=1, lt=2**63)] = None,
    causal: bool | None = None,
    order: Annotated[str, Query(pattern="^-?key$")] = "key",
    cursor: documents.Cursor = None,
    limit: documents.Limit = 50,
) -> Response:
    """The keys of all problems that were ever tuned or asked about in a report."""
    after = documents.read_cursor(cursor, (str,))
    with database.read() as session:
        page = ProblemRepository(session).page(
            search=q,
            pass_=pass_,
            dtype=dtype,
            head_dim=head_dim,
            causal=causal,
            descending=order.startswith("-"),
            after=after,
            limit=limit,
        )
    return documents.listed(page)


@router.get(
    "/devices", response_model=documents.Listed[documents.ListedDevice], responses=_errors, summary="All devices"
)
def devices(
    database: DatabaseOfApp,
    q: documents.Search = "",
    cursor: documents.Cursor = None,
    limit: documents.Limit = 50,
) -> Response:
    """Every device that was ever tuned, has answers or was reported."""
    after = documents.read_cursor(cursor, (str,))
    with database.read() as session:
        page = DeviceRepository(session).page(search=q, after=after, limit=limit)
    return documents.listed(page)


@router.get("/trials", response_model=documents.Listed[documents.ListedTrial], responses=_errors, summary="All trials")
def trials(
    database: DatabaseOfApp,
    device: OfDevice,
    problem: OfProblem,
    backend: Annotated[str | None, Query(max_length=100, pattern=r"^[^\x00]*$")] = None,
    outcome: Outcome | None = None,
    job: Annotated[str | None, Query(max_length=64, pattern=r"^[0-9a-f]+$")] = None,
    order: Annotated[str, Query(pattern="^-?(id|median_ms)$", description="`-id`: the newest first.")] = "-id",
    cursor: documents.Cursor = None,
    limit: documents.Limit = 50,
) -> Response:
    """Everything that was tried. Sorted by `median_ms`, for one problem, only trials that were timed are listed."""
    sort = TrialSort(order.removeprefix("-"))
    if sort is TrialSort.MEDIAN and problem is None:
        raise ParameterError("order", "medians are compared within one problem only; give `problem`, or order by id")
    after = documents.read_cursor(cursor, (int,) if sort is TrialSort.ID else (float, int))
    with database.read() as session:
        page = TrialRepository(session).page(
            problem=problem,
            device_key=device,
            backend=backend,
            outcome=outcome,
            job_id=job,
            sort=sort,
            descending=order.startswith("-"),
            after=after,
            limit=limit,
        )
    return documents.listed(page)


@router.get("/demand", response_model=documents.DemandList, responses=_errors, summary="Where GPU time is lost")
def demand(database: DatabaseOfApp, device: OfDevice, limit: documents.Limit = 50) -> Response:
    """What clients used and missed, by bucket, what costs most first. `lost_ms` is an estimate: the calls that no exact
    answer served, their expected time, and the share of it that tuned problems won on that device."""
    with database.read() as session:
        found = DemandRepository(session).list(device_key=device, limit=limit)
    return documents.written({"items": [{**codec.to_json(one), "lost_ms": one.lost_ms} for one in found]})


@router.get("/audit", response_model=documents.Listed[documents.AuditEntry], responses=_errors, summary="Who did what")
def audit(database: DatabaseOfApp, cursor: documents.Cursor = None, limit: documents.Limit = 50) -> Response:
    """Every change of jobs, snapshots, channels and tokens, the newest first."""
    after = documents.read_cursor(cursor, (int,))
    with database.read() as session:
        return documents.listed(AuditRepository(session).page(after=after, limit=limit))
