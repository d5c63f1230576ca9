"""GET /v1/answers: one answer, or all of a device."""

from typing import Annotated

from fastapi import APIRouter, Header
from starlette.responses import Response

from tilewise.domain import codec

from . import schemas
from .conditional import conditional, not_modified
from .dependencies import AnswerBookOfApp, AskedProblem, AskedSoftware, DeviceKey
from .errors import responses

router = APIRouter(prefix="/v1/answers", tags=["answers"])
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the asker has already.")]


@router.get(
    "/{device_key}/{problem_key}",
    response_model=schemas.Answer,
    responses={**not_modified, **responses(422, 500, 503)},
    summary="What to run for a problem on a device",
)
def one_answer(
    device_key: DeviceKey,
    problem: AskedProblem,
    software: AskedSoftware,
    book: AnswerBookOfApp,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The best answer there is. A device or a problem that was never measured is no error: the answer is torch's
    own choice, with match `default`."""
    body = codec.canonical(book.answer(device_key, problem, software))
    return conditional(body, if_none_match)


@router.get(
    "/{device_key}",
    response_model=schemas.Snapshot,
    responses={**not_modified, **responses(422, 500, 503)},
    summary="All answers of a device",
)
def all_answers(device_key: DeviceKey, book: AnswerBookOfApp, if_none_match: IfNoneMatch = None) -> Response:
    """All standing answers in the form of a snapshot file, which a client can keep as it comes. The ETag is the
    snapshot's id; a device without answers has the empty snapshot."""
    found, body = book.snapshot(device_key)
    return conditional(body, if_none_match, tag=found)
