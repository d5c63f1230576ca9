"""GET /problems/DEVICE/PROBLEM: everything known about one problem on one device."""

import heapq
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from tilewise.db.answer_lists import AnswerListRepository, ListedAnswer
from tilewise.db.answers import AnswerRepository
from tilewise.db.devices import DeviceRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.trial_points import TrialPoint, TrialPointRepository
from tilewise.domain.answer import Answer
from tilewise.domain.errors import NotFoundError
from tilewise.domain.peaks import Roof, peaks_of, roof_of
from tilewise.domain.problem import Pass, Problem
from tilewise.domain.trial import Outcome

from .. import describe
from ..dependencies import AskedProblem, DatabaseOfApp, DeviceKey, PointsOfApp
from ..errors import responses
from ..landscape import SHADES, Landscape, Parameter, Space, Spot, grid, narrowed, parameters
from . import commands, finals, landscape_charts, problem_charts
from .listing import Address, address
from .templating import News, marked, page

PATH = "/problems/{device_key}/{problem_key}"
FASTEST = 12  # trials in the table of the fastest

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True, slots=True)
class Subject:
    """What the page is about: a problem on a device with all its trials, and how it is looked at."""

    device_key: str
    problem: Problem
    trials: Landscape
    query: tuple[tuple[str, str], ...]

    @property
    def points(self) -> tuple[TrialPoint, ...]:
        return self.trials.points


@dataclass(frozen=True, slots=True)
class View:
    """The part of a landscape that is looked at: a space, its spots behind the filters, and the parameters of it all.

    `wanted` are the filters; x and y the parameters of the grid, None where fewer than two vary.
    """

    space: Space
    spots: tuple[Spot, ...]
    every: int
    parameters: tuple[Parameter, ...]
    wanted: tuple[tuple[str, str], ...]
    x: Parameter | None
    y: Parameter | None


def _subject(
    device_key: DeviceKey, problem: AskedProblem, database: DatabaseOfApp, book: PointsOfApp, request: Request
) -> Subject:
    with database.read() as session:
        trials = book.of(TrialPointRepository(session, device_key, problem))
    return Subject(device_key, problem, trials, tuple(request.query_params.items()))


SubjectOfPath = Annotated[Subject, Depends(_subject)]


@router.get(PATH, responses=responses(404, 422, 500, 503))
def problem(subject: SubjectOfPath, database: DatabaseOfApp, request: Request) -> Response:
    """The page. Of its query string, what makes no sense is read as if it were not there."""
    device_key, asked = subject.device_key, subject.problem
    with database.read() as session:
        listed = next(iter(AnswerListRepository(session).some([(device_key, asked.key)])), None)
        if listed is None and not subject.points:
            raise NotFoundError(f"{asked.key} was never tuned on {device_key}: tilewise tune --problem {asked.key}")
        history = AnswerRepository(session).history(device_key, asked)
        failures = TrialPointRepository(session, device_key, asked).failures()
        device = DeviceRepository(session).get(device_key)
        answer = listed.answer if listed else None
        evidence = answer.evidence if answer else None
        job = JobRepository(session).get(evidence.job) if evidence and evidence.job else None
    seen = view(subject)
    at = _address(subject, request, seen)
    outcomes = Counter(point.outcome for point in subject.points)
    newest = subject.points[-1].id if subject.points else 0
    return page(
        "problem.html",
        path="/problems",
        news=News(f"{describe.link(device_key, asked)}/news", _mark(answer, len(subject.points), newest)),
        charts=True,
        at=at,
        subject=subject,
        listed=listed,
        row=describe.row(listed) if listed else None,
        device=device,
        finalists=finals.rows(answer) if answer else (),
        absent=finals.absent(subject.points, failures, answer),
        roof=roof_of(asked, device),
        no_roof=_no_roof(asked, peaks_of(device) is not None),
        placed=_placed(listed, roof_of(asked, device)),
        spaces=subject.trials.spaces,
        view=seen,
        grid=grid(seen.spots, seen.x, seen.y) if seen and seen.x and seen.y else None,
        shades=SHADES,
        fastest=_fastest(subject.trials),
        failures=failures,
        outcomes=outcomes.most_common(),
        failed=outcomes.total() - outcomes[Outcome.OK],
        history=finals.history(history),
        command=commands.tune(asked, job.job.budget if job else None),
        job=job,
    )


@router.get(f"{PATH}/news")
def news(device_key: DeviceKey, asked: AskedProblem, database: DatabaseOfApp) -> Response:
    """The mark of the page as it would be now."""
    with database.read() as session:
        answer = AnswerRepository(session).get(device_key, asked)
        return marked(_mark(answer, *TrialPointRepository(session, device_key, asked).state()))


@router.get(f"{PATH}/charts/backends")
def backends_chart(device_key: DeviceKey, asked: AskedProblem, database: DatabaseOfApp) -> Response:
    with database.read() as session:
        answer = AnswerRepository(session).get(device_key, asked)
    if answer is None:
        raise NotFoundError(f"no final of {asked.key} on {device_key} was held yet")
    return problem_charts.backends(finals.rows(answer)).response()


@router.get(f"{PATH}/charts/roofline")
def roofline_chart(device_key: DeviceKey, asked: AskedProblem, database: DatabaseOfApp) -> Response:
    with database.read() as session:
        answer = AnswerRepository(session).get(device_key, asked)
        device = DeviceRepository(session).get(device_key)
    roof = roof_of(asked, device)
    if answer is None or roof is None:
        raise NotFoundError(f"the roof over {asked.key} on {device_key} is not known")
    return problem_charts.roofline(asked, roof, finals.rows(answer)).response()


@router.get(f"{PATH}/charts/history")
def history_chart(device_key: DeviceKey, asked: AskedProblem, database: DatabaseOfApp) -> Response:
    with database.read() as session:
        history = AnswerRepository(session).history(device_key, asked)
    return problem_charts.over_time(finals.history(history)).response()


@router.get(f"{PATH}/charts/course")
def course_chart(subject: SubjectOfPath) -> Response:
    """The search from its first trial to its last, or from one to another; `axis` is log or linear."""
    query = dict(subject.query)
    start, end = (_number(query.get(name)) for name in ("from", "to"))
    log = query.get("axis") != "linear"
    return landscape_charts.course(subject.trials, start=start, end=end, log=log).response()


@router.get(f"{PATH}/charts/parallel")
def parallel_chart(subject: SubjectOfPath) -> Response:
    seen = view(subject)
    if seen is None:
        raise NotFoundError(f"no config of {subject.problem.key} was tried on {subject.device_key} yet")
    return landscape_charts.parallel(seen.spots, seen.parameters).response()


def view(subject: Subject) -> View | None:
    """Return the part of the landscape that the query string asks for; None where no trial has a parameter."""
    query = dict(subject.query)
    known = [space for space, _ in subject.trials.spaces]
    if not known:
        return None
    space = next((each for each in known if each.name == query.get("space")), known[0])
    every = subject.trials.spots(space)
    known_parameters = subject.trials.parameters(space)
    names = {parameter.name for parameter in known_parameters}
    wanted = tuple(
        (name.removeprefix("p."), value)
        for name, value in subject.query
        if name.startswith("p.") and name.removeprefix("p.") in names and value
    )
    spots = narrowed(every, dict(wanted)) if wanted else every
    varying = (parameters(spots) if wanted else known_parameters) or known_parameters
    by_name = {parameter.name: parameter for parameter in varying}
    x = by_name.get(query.get("x", ""), varying[0] if varying else None)
    others = [each for each in varying if x is not None and each.name != x.name]
    y = next((each for each in others if each.name == query.get("y")), others[0] if others else None)
    return View(space, spots, len(every), known_parameters, wanted, x, y)


def _address(subject: Subject, request: Request, seen: View | None) -> Address:
    filters = [f"p.{parameter.name}" for parameter in seen.parameters] if seen else []
    return address(describe.link(subject.device_key, subject.problem), request, ("space", "x", "y", *filters, "axis"))


def _fastest(trials: Landscape) -> tuple[tuple[TrialPoint, float], ...]:
    right = [(point, ms) for point, ms in zip(trials.points, trials.levels, strict=True) if ms is not None]
    return tuple(heapq.nsmallest(FASTEST, right, key=lambda pair: pair[1]))


def _mark(answer: Answer | None, trials: int, newest: int) -> str:
    return f"{answer.version if answer else 0}-{trials}-{newest}"


def _placed(listed: ListedAnswer | None, roof: Roof | None) -> float | None:
    """Return which share of its roof the winner reaches."""
    if listed is None or roof is None or not listed.answer.expected_ms:
        return None
    return listed.forward_flops / listed.answer.expected_ms / 1e9 / roof.roof


def _no_roof(asked: Problem, known: bool) -> str:
    if not known:
        return "The peaks of this device are not known here, so there is no roof to compare with."
    if asked.pass_ is Pass.TRAINING:
        return "A training step has no agreed count of operations, so it has no place under a roof."
    return "What this problem computes and moves depends on its lengths, so it has no place under a roof."


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) < 10 else None
