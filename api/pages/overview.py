"""GET /: how things stand, what was won, and what to tune next."""

from fastapi import APIRouter
from starlette.responses import Response

from tilewise.db.answer_lists import AnswerListRepository, Sort
from tilewise.db.answers import AnswerRepository
from tilewise.db.demand import DemandRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.domain.job import JobState

from .. import describe
from ..dependencies import DatabaseOfApp
from ..errors import responses
from .templating import News, marked, page

WINS = 6
WANTED = 6
CHANGES = 8

router = APIRouter(include_in_schema=False)


@router.get("/", responses=responses(500, 503))
def overview(database: DatabaseOfApp) -> Response:
    """The page; with nothing in the database it says what to do first."""
    with database.read() as session:
        lists, answers, demand = AnswerListRepository(session), AnswerRepository(session), DemandRepository(session)
        jobs = JobRepository(session).counts()
        return page(
            "overview.html",
            path="/",
            news=News("/news", str(answers.newest())),
            summary=lists.summary(),
            devices=DeviceRepository(session).keys(),
            running=jobs.get(JobState.RUNNING, 0),
            queued=jobs.get(JobState.QUEUED, 0),
            saved=demand.saved(),
            wins=[describe.row(one) for one in lists.page(sort=Sort.SPEEDUP, limit=WINS).answers],
            wanted=[one for one in demand.proposals(limit=WANTED) if not one.standing],
            reported=sum(demand.totals().values()),
            changes=answers.newest_changes(CHANGES),
        )


@router.get("/news")
def news(database: DatabaseOfApp) -> Response:
    """The mark of the overview, and of every list of answers: the number of the newest change of any."""
    with database.read() as session:
        return marked(AnswerRepository(session).newest())
