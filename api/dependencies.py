"""What routes ask for: the objects of the running app, and parameters read into the types of domain/."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from tilewise.db.session import Database
from tilewise.db.signature import Signer
from tilewise.domain.device import check_device_key
from tilewise.domain.errors import DeviceError
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software

from .access import Caller
from .answer_book import AnswerBook
from .errors import ParameterError
from .metrics import Metrics
from .points import PointBook


def _database(request: Request) -> Database:
    found: Database = request.app.state.database
    return found


def _answer_book(request: Request) -> AnswerBook:
    found: AnswerBook = request.app.state.answer_book
    return found


def _points(request: Request) -> PointBook:
    found: PointBook = request.app.state.points
    return found


def _metrics(request: Request) -> Metrics:
    found: Metrics = request.app.state.metrics
    return found


def _signer(request: Request) -> Signer | None:
    found: Signer | None = request.app.state.signer
    return found


def _actor(request: Request) -> str:
    caller: Caller = request.state.caller
    return caller.name


def checked_device(key: str, field: str) -> str:
    """Return `key`; raises ParameterError, naming the field, where it is no device key."""
    try:
        return check_device_key(key)
    except DeviceError as error:
        raise ParameterError(field, str(error)) from error


def checked_problem(key: str, field: str) -> Problem:
    """Return the problem of `key`; raises ParameterError, naming the field, where it is none."""
    try:
        return Problem.parse(key)
    except ValueError as error:
        raise ParameterError(field, str(error)) from error


def checked_software(key: str | None, field: str) -> Software | None:
    """Return the software of `key`, None for None; raises ParameterError, naming the field, where it is none."""
    try:
        return None if key is None else Software.parse(key)
    except ValueError as error:
        raise ParameterError(field, str(error)) from error


def _device_key(
    device_key: Annotated[
        str, Path(max_length=200, description="Key of a device.", examples=["nvidia-h200.sm90.141g.700w"])
    ],
) -> str:
    return checked_device(device_key, "device_key")


def _problem(
    problem_key: Annotated[
        str,
        Path(
            max_length=255,
            description="Canonical key of a problem.",
            examples=["inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"],
        ),
    ],
) -> Problem:
    return checked_problem(problem_key, "problem_key")


def _software(
    software: Annotated[
        str | None,
        Query(
            max_length=4000,
            description="Key of the software that will run the answer; without it, no answer counts as stale.",
            examples=["torch@2.13.0,triton@3.7.1"],
        ),
    ] = None,
) -> Software | None:
    return checked_software(software, "software")


def _asked_device(
    device: Annotated[
        str | None, Query(max_length=200, description="Only of this device.", examples=["nvidia-h200.sm90.141g.700w"])
    ] = None,
) -> str | None:
    return None if device is None else checked_device(device, "device")


def _about_problem(
    problem: Annotated[
        str | None,
        Query(
            max_length=255,
            description="Only of this problem.",
            examples=["inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"],
        ),
    ] = None,
) -> Problem | None:
    return None if problem is None else checked_problem(problem, "problem")


DatabaseOfApp = Annotated[Database, Depends(_database)]
AnswerBookOfApp = Annotated[AnswerBook, Depends(_answer_book)]
PointsOfApp = Annotated[PointBook, Depends(_points)]
MetricsOfApp = Annotated[Metrics, Depends(_metrics)]
SignerOfApp = Annotated[Signer | None, Depends(_signer)]
Actor = Annotated[str, Depends(_actor)]
DeviceKey = Annotated[str, Depends(_device_key)]
AskedProblem = Annotated[Problem, Depends(_problem)]
AskedSoftware = Annotated[Software | None, Depends(_software)]
OfDevice = Annotated[str | None, Depends(_asked_device)]
OfProblem = Annotated[Problem | None, Depends(_about_problem)]
