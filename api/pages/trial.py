"""GET /trials/NUMBER: one trial, with what was run, what came of it, and the command that does it again."""

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.responses import Response

from tilewise.db.trial_points import kept_trial
from tilewise.domain.errors import NotFoundError
from tilewise.domain.trial import Outcome

from .. import describe
from ..dependencies import DatabaseOfApp
from ..errors import responses
from . import commands
from .templating import page

router = APIRouter(include_in_schema=False)


@router.get("/trials/{number}", responses=responses(404, 422, 500, 503))
def trial(number: Annotated[int, Path(ge=1, lt=2**63)], database: DatabaseOfApp) -> Response:
    with database.read() as session:
        found = kept_trial(session, number)
    if found is None:
        raise NotFoundError(f"there is no trial {number}")
    listed = found.listed
    return page(
        "trial.html",
        path="/problems",
        listed=listed,
        trial=listed.trial,
        software=found.software,
        back=describe.link(listed.device_key, listed.problem),
        command=commands.attempt(listed.problem, listed.trial.candidate),
        right=listed.trial.outcome is Outcome.OK,
    )
