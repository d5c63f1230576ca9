"""What a device's answers tell of those that are not there: what runs without one loses, as seen so far.

Nine times in ten the next of exchangeable values is at most the ceil(0.9 * (n + 1))-th smallest of the n before it,
whatever their distribution (conformal prediction: Vovk, Gammerman, Shafer, Algorithmic Learning in a Random World,
2005, section 2.2); below nine values there is no such one. What is assumed is that the problems asked about are of the
same sort as those that were tuned.
"""

import math
from collections.abc import Iterable

from .answer import Answer

CONFIDENCE = 0.9


def upper_bound(values: Iterable[float]) -> float | None:
    """Return what a further value stays at or below 9 times in 10; None where there are too few to tell."""
    ordered = sorted(values)
    rank = math.ceil(CONFIDENCE * (len(ordered) + 1) - 1e-9)
    return ordered[rank - 1] if rank <= len(ordered) else None


def lost_by_default(answers: Iterable[Answer]) -> float | None:
    """Return what share of time torch's own choice loses at most of a problem like those of `answers`."""
    times = ((found.baseline_ms, found.expected_ms) for found in answers)
    return upper_bound(max(0.0, baseline / best - 1) for baseline, best in times if baseline and best)


def lost_when_stale(answers: Iterable[Answer]) -> float | None:
    """Return what share of time an answer of other software loses at most."""
    return upper_bound(found.stale_loss for found in answers if found.stale_loss is not None)
