"""What requests carry, and the documents of lists: jobs, trials, problems, devices, snapshots, channels, demand."""

import base64
import binascii
import gzip
import json
from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from tilewise.db.paging import Page, Position
from tilewise.db.signature import Signer
from tilewise.domain import codec
from tilewise.domain.snapshot import with_signature

from . import schemas
from .conditional import conditional, tag_of
from .errors import ParameterError

MAX_LIMIT = 200
MAX_PROBLEMS = 1000
_PROBLEM = "inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal"
_DEVICE = "nvidia-h200.sm90.141g.700w"
_ID = "5d41402abc4b2a76b9719d911017c5925d41402abc4b2a76b9719d911017c592"
T = TypeVar("T")

# PostgreSQL takes no NUL in a text.
Text = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00]*$")]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT, description="Entries of one page.")]
Cursor = Annotated[str | None, Query(max_length=600, description="`next` of the page before.")]
Search = Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$", description="What the key must hold.")]


def read_cursor(cursor: str | None, kinds: tuple[type, ...]) -> Position | None:
    """Return the position that a cursor holds. Raises ParameterError for one that this list did not give out."""
    if cursor is None:
        return None
    try:
        values = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        if not isinstance(values, list):
            raise ValueError("no list")
        return tuple(_read(kind, value) for kind, value in zip(kinds, values, strict=True))
    except (ValueError, TypeError, OverflowError, RecursionError, binascii.Error) as error:
        raise ParameterError("cursor", "not a cursor of this list; use `next` of its page before") from error


def _read(kind: Any, value: Any) -> Any:
    if kind is datetime:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError("no zone")
        return moment
    if type(value) is not kind or (kind is int and abs(value) >= 2**63) or (kind is str and "\0" in value):
        raise ValueError(f"no {kind.__name__}")
    return value


def cursor_behind(page: Page[T]) -> str | None:
    """Return the cursor of what comes behind a page; None at the end."""
    if page.next is None:
        return None
    return base64.b64encode(codec.canonical(list(page.next)), altchars=b"-_").decode()


def listed(page: Page[T]) -> Response:
    """Return a page as the response of a list."""
    return written({"items": page.items, "next": cursor_behind(page)})


def written(document: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a document of domain types as a response."""
    return Response(codec.canonical(document), status, headers, media_type="application/json")


def snapshot(
    request: Request, signer: Signer | None, snapshot_id: str, gzipped: bytes, if_none_match: str | None
) -> Response:
    """Return a snapshot's file: signed where the service has a key, as it lies gzipped for whoever takes that."""
    tag = tag_of(snapshot_id if signer is None else f"{snapshot_id}-{signer.public_key[:12]}")
    # what comes encoded the middleware leaves alone, and so adds no Vary
    body, headers = gzipped, {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
    if signer is not None:
        plain = with_signature(gzip.decompress(gzipped), signer.sign(snapshot_id))
        body = gzip.compress(plain, 1, mtime=0)
    if "gzip" not in request.headers.get("accept-encoding", ""):
        body, headers = gzip.decompress(body), {}
    return conditional(body, if_none_match, tag=tag, headers=headers)


class Listed(BaseModel, Generic[T]):
    """Some of a list. `next` is the cursor of the page after it; null at the end."""

    items: list[T]
    next: str | None


class Question(BaseModel):
    """Many problems at once."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"device": _DEVICE, "problems": [_PROBLEM], "software": "torch@2.13.0"}}
    )

    device: str = Field(max_length=200, description="Key of a device.")
    problems: list[Annotated[str, Field(max_length=255)]] = Field(max_length=MAX_PROBLEMS)
    software: str | None = Field(default=None, max_length=4000)
    evidence: bool = Field(default=False, description="Whether each answer comes with its evidence.")


class Answers(BaseModel):
    answers: list[schemas.Answer]


class Budget(BaseModel):
    name: str
    trials: int
    seconds: float
    patience: int
    finalists: int
    rounds: int
    stretch: float


class Lease(BaseModel):
    owner: str
    attempt: int
    expires: datetime


class JobDocument(BaseModel):
    """A tuning that was asked for. `progress` goes from 0 to 1."""

    id: str
    problem: str
    device_key: str
    budget: Budget
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    progress: float
    message: str
    lease: Lease | None
    created: datetime


class JobRecord(BaseModel):
    """A job, how often it was started, and the fastest candidate so far with its median in milliseconds."""

    job: JobDocument
    attempt: int
    started: datetime | None
    finished: datetime | None
    best: schemas.Candidate | None
    best_ms: float | None


class NewJob(BaseModel):
    """A tuning to queue; `trials` and `seconds` replace those of the named budget."""

    model_config = ConfigDict(
        json_schema_extra={"example": {"problem": _PROBLEM, "device": _DEVICE, "budget": "normal"}}
    )

    problem: str = Field(max_length=255)
    device: str = Field(max_length=200)
    budget: Literal["quick", "normal", "full"] = "normal"
    trials: int | None = Field(default=None, ge=1, le=100_000)
    seconds: float | None = Field(default=None, gt=0, le=86_400)


class NumericError(BaseModel):
    worst: float
    tensor: str
    case: str


class TrialDocument(BaseModel):
    candidate: schemas.Candidate
    stage: str
    outcome: str
    measurement: schemas.Measurement | None
    error: NumericError | None
    message: str
    seconds: float
    when: datetime
    job: str | None
    attempt: int


class ListedTrial(BaseModel):
    """One candidate tried once."""

    id: int
    problem: str
    device_key: str
    trial: TrialDocument


class Device(BaseModel):
    kind: Literal["cuda", "cpu"]
    name: str
    arch: str
    units: int
    memory_gib: int
    power_limit_w: int | None
    mig: str | None
    shared_memory: int


class ListedDevice(BaseModel):
    """A device; null where nothing but its key is known."""

    key: str
    device: Device | None


class FrozenSnapshot(BaseModel):
    id: str
    created: datetime
    answers: int
    note: str


class NewSnapshot(BaseModel):
    """What to freeze: the standing answers of a device, or of all."""

    model_config = ConfigDict(json_schema_extra={"example": {"device": _DEVICE, "note": "before the upgrade"}})

    device: str | None = Field(default=None, max_length=200)
    note: Text = ""


class ChannelChange(BaseModel):
    id: int
    name: str
    snapshot: str
    previous: str | None
    reason: str
    actor: str
    changed: datetime


class Channel(BaseModel):
    """What a channel points at, and what it pointed at before, the newest first."""

    name: str
    snapshot: str
    history: list[ChannelChange]


class Channels(BaseModel):
    names: list[str]


class MoveChannel(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"snapshot": _ID, "reason": "measured on the new driver"}})

    snapshot: str = Field(pattern=r"^[0-9a-f]{64}$")
    reason: Text = ""


class RollBack(BaseModel):
    """Where to go back to: a snapshot of the channel's history, or the one before."""

    model_config = ConfigDict(json_schema_extra={"example": {"reason": "slower at night"}})

    to: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    reason: Text = ""


class Use(BaseModel):
    problem: str = Field(max_length=255)
    match: Literal["exact", "stale", "near", "predicted", "default"]
    calls: int = Field(ge=1, le=2**53)


class UsageReport(BaseModel):
    """What one client used and missed since its last report."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "device": _DEVICE,
                "snapshot": _ID,
                "uses": [{"problem": _PROBLEM, "match": "default", "calls": 1200}],
            }
        }
    )

    device: str = Field(max_length=200)
    snapshot: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    uses: list[Use] = Field(max_length=MAX_PROBLEMS)


class DemandDocument(BaseModel):
    """What all clients asked of one bucket on a device, and the milliseconds that are estimated to be lost by it."""

    device_key: str
    problem: str
    calls: int
    missed: int
    first: datetime
    last: datetime
    expected_ms: float | None
    loss: float
    standing: bool
    lost_ms: float


class DemandList(BaseModel):
    items: list[DemandDocument]


class AuditEntry(BaseModel):
    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    detail: str


class TokenDocument(BaseModel):
    """A token without its secret. The scope `admin` allows everything."""

    id: str
    name: str
    scopes: list[Literal["read", "report", "tune", "admin"]]
    created: datetime
    expires: datetime | None
    revoked: datetime | None


class Tokens(BaseModel):
    items: list[TokenDocument]


class NewToken(BaseModel):
    """Whose token it is, what it allows, and after how many days it ends; null for never."""

    model_config = ConfigDict(json_schema_extra={"example": {"name": "ci", "scopes": ["read", "report"], "days": 90}})

    name: str = Field(max_length=200, pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")
    scopes: list[Literal["read", "report", "tune", "admin"]] = Field(min_length=1, max_length=4)
    days: int | None = Field(default=None, ge=1, le=36_500)


class MadeToken(BaseModel):
    """A new token; `secret` is what its bearer sends, and is told once."""

    token: TokenDocument
    secret: str
