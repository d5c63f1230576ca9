"""What routes ask for: the objects of the running app, and parameters read into the types of domain/."""

from typing import Annotated

from fastapi import Depends, Path, Query, Request

from tilewise.db.session import Database
from tilewise.domain.device import check_device_key
from tilewise.domain.errors import DeviceError
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software

from .answer_book import AnswerBook
from .errors import ParameterError


def _database(request: Request) -> Database:
    found: Database = request.app.state.database
    return found


def _answer_book(request: Request) -> AnswerBook:
    found: AnswerBook = request.app.state.answer_book
    return found


def _device_key(
    device_key: Annotated[
        str, Path(max_length=200, description="Key of a device.", examples=["nvidia-h200.sm90.141g.700w"])
    ],
) -> str:
    try:
        return check_device_key(device_key)
    except DeviceError as error:
        raise ParameterError("device_key", str(error)) from error


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
    try:
        return Problem.parse(problem_key)
    except ValueError as error:
        raise ParameterError("problem_key", str(error)) from error


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
    try:
        return None if software is None else Software.parse(software)
    except ValueError as error:
        raise ParameterError("software", str(error)) from error


DatabaseOfApp = Annotated[Database, Depends(_database)]
AnswerBookOfApp = Annotated[AnswerBook, Depends(_answer_book)]
DeviceKey = Annotated[str, Depends(_device_key)]
AskedProblem = Annotated[Problem, Depends(_problem)]
AskedSoftware = Annotated[Software | None, Depends(_software)]
