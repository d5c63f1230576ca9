"""What clients used and missed, and what that says about where GPU time is lost."""

from dataclasses import dataclass
from datetime import datetime

from .answer import Match
from .problem import Problem

# Share of the time that a problem without an answer is taken to lose, where its device has no measured answers to
# tell; that an answer of older software is; and that one of a near problem or another device is.
UNKNOWN_LOSS = 0.1
STALE_LOSS = 0.02
NEAR_LOSS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """How often one answer was used: `calls` of `problem`, answered with `match`."""

    problem: Problem
    match: Match
    calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """One report of one client. `snapshot` is the id of what it had sealed, None for nothing."""

    device_key: str
    snapshot: str | None
    uses: tuple[Use, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What all clients together asked of one bucket on one device.

    - calls: all calls; missed: those that no exact answer served.
    - expected_ms: time of one call, measured or estimated from the device's other answers; None where neither is there.
    - loss: share of that time that a missed call is estimated to lose.
    - standing: whether an answer stands by now, so that the loss is over.
    """

    device_key: str
    problem: Problem
    calls: int
    missed: int
    first: datetime
    last: datetime
    expected_ms: float | None
    loss: float
    standing: bool

    @property
    def lost_ms(self) -> float:
        """Estimated milliseconds of device time lost so far; 0 where nothing is known about the time of a call."""
        return self.missed * (self.expected_ms or 0.0) * self.loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """What answers saved so far: device time in ms, over so many reported calls, since the first report of them.

    Of each call that an exact or a stale answer served, what the standing answer's final won over torch's own choice.
    """

    ms: float
    calls: int
    since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Who runs a snapshot: `reporter` is the name of the token that `reports` came with, from `first` to `last`."""

    snapshot: str
    device_key: str
    reporter: str
    reports: int
    first: datetime
    last: datetime
