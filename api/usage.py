"""POST /v1/usage: what clients used and missed."""

from fastapi import APIRouter
from starlette.responses import Response

from tilewise.db.demand import DemandRepository
from tilewise.db.pins import PinRepository
from tilewise.db.snapshots import SnapshotRepository
from tilewise.domain.answer import Match
from tilewise.domain.usage import Usage, Use

from . import documents
from .dependencies import Actor, DatabaseOfApp, checked_device, checked_problem
from .errors import responses

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.post("", status_code=204, responses=responses(422, 500, 503), summary="Report what was used and missed")
def report(usage: documents.UsageReport, database: DatabaseOfApp, actor: Actor) -> Response:
    """Counts are added to those of other reports. A client sends each batch once: one that gets lost is not missed."""
    uses = tuple(
        Use(problem=checked_problem(use.problem, f"uses.{number}.problem"), match=Match(use.match), calls=use.calls)
        for number, use in enumerate(usage.uses)
    )
    found = Usage(device_key=checked_device(usage.device, "device"), snapshot=usage.snapshot, uses=uses)
    with database.write() as session:
        DemandRepository(session).add(found)
        if found.snapshot is not None:
            SnapshotRepository(session).note_use(found.snapshot)
            PinRepository(session).add(found.snapshot, found.device_key, actor)
    return Response(status_code=204)
