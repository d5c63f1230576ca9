"""/v1/answers: one answer, many at once, or all of a device."""

from typing import Annotated

from fastapi import APIRouter, Header, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from tilewise.domain import codec
from tilewise.domain.software import Software

from . import documents, schemas
from .answer_book import AnswerBook, Reply, RequestKey
from .conditional import conditional, not_modified, tag_of
from .dependencies import (
    AnswerBookOfApp,
    AskedProblem,
    AskedSoftware,
    DeviceKey,
    MetricsOfApp,
    SignerOfApp,
    checked_device,
    checked_problem,
    checked_software,
)
from .errors import responses

router = APIRouter(prefix="/v1/answers", tags=["answers"])
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the asker has already.")]


@router.get(
    "/{device_key}/{problem_key}",
    response_model=schemas.Answer,
    responses={**not_modified, **responses(422, 500)},
    summary="What to run for a problem on a device",
)
def one_answer(
    request: Request,
    device_key: DeviceKey,
    problem: AskedProblem,
    software: AskedSoftware,
    book: AnswerBookOfApp,
    metrics: MetricsOfApp,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The best answer there is. A device or a problem that was never measured is no error: the answer is torch's
    own choice, with match `default`."""
    seen = book.version
    answer = book.answer(device_key, problem, software)
    body = codec.canonical(answer)
    tag = tag_of(body)
    book.remember(_key(request), Reply(tag.encode(), body, answer.match), seen)
    metrics.lookup(answer.match)
    return conditional(body, if_none_match, tag=tag)


@router.get(
    "/{device_key}",
    response_model=schemas.Snapshot,
    responses={**not_modified, **responses(422, 500)},
    summary="All answers of a device",
)
def all_answers(
    request: Request,
    device_key: DeviceKey,
    book: AnswerBookOfApp,
    signer: SignerOfApp,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """All standing answers in the form of a snapshot file, which a client can keep as it comes. The ETag is the
    snapshot's id; a device without answers has the empty snapshot."""
    seen = book.version
    found = book.snapshot(device_key)
    response = documents.snapshot(request, signer, found.id, found.gzipped, if_none_match)
    if response.status_code == 200 and "content-encoding" in response.headers:
        tag = response.headers["etag"].encode()
        book.remember(_key(request), Reply(tag, bytes(response.body), "", gzipped=True), seen)
    return response


def _key(request: Request) -> RequestKey:
    return AnswerBook.key_of(request.scope, request.headers.get("accept-encoding", "").encode("latin-1"))


@router.post(
    "",
    response_model=documents.Answers,
    responses=responses(422, 500),
    summary="What to run for many problems on a device",
)
async def many_answers(question: documents.Question, book: AnswerBookOfApp, metrics: MetricsOfApp) -> Response:
    """One answer for each problem, in their order. The evidence is left out unless it is asked for."""
    device_key = checked_device(question.device, "device")
    software = checked_software(question.software, "software")
    found = book.pieces(device_key, question.problems, question.software, evidence=question.evidence)
    if None in found:  # what is not at hand as bytes takes time that the event loop has not
        found = list(await run_in_threadpool(_pieces, book, device_key, software, question))
    counts: dict[str, int] = {}
    for piece in found:
        assert piece is not None
        counts[piece.match] = counts.get(piece.match, 0) + 1
    for match, number in counts.items():
        metrics.lookup(match, number)
    body = b'{"answers":[%s]}' % b",".join(piece.body for piece in found if piece is not None)
    return Response(body, media_type="application/json")


def _pieces(book: AnswerBook, device_key: str, software: Software | None, question: documents.Question) -> list[Reply]:
    problems = [checked_problem(key, f"problems.{number}") for number, key in enumerate(question.problems)]
    return book.make_pieces(device_key, problems, software, question.software, evidence=question.evidence)
