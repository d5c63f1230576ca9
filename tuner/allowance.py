"""What a budget allows beside the search: backends that compile for long, and the end of what compiles then."""

from tilewise.domain.job import Budget
from tilewise.kernels.backend import Backend

# The share of the search's seconds that compiling one config may take where it is measured: nothing else is meanwhile.
AFFORDABLE = 0.5
# What compiles there waits behind the rest for this share of the search's seconds, and at most for so many.
DEFERRED, MAX_DEFERRED = 0.5, 60.0
# A default that is not compiled when the search ends is waited for: a share of its seconds, within limits.
GRACE, MIN_GRACE, MAX_GRACE = 0.25, 2.0, 10.0


def deferred(budget: Budget) -> float:
    """Return how many seconds what compiles where it is measured may wait behind everything else."""
    return min(MAX_DEFERRED, DEFERRED * budget.seconds)


def grace(budget: Budget) -> float:
    """Return how many seconds after the search's end a default may still compile."""
    return min(MAX_GRACE, max(MIN_GRACE, GRACE * budget.seconds))


def why_skipped(backend: Backend, budget: Budget, *, ahead: bool) -> str | None:
    """Return why a budget cannot afford to compile a backend, None where it can.

    - ahead: other processes compile it, which costs the search nothing: it has to be done in time.
    """
    seconds, took = budget.seconds, f"compiling it takes about {backend.compile_seconds:.0f} s"
    if ahead:
        most, why = seconds + grace(budget), f"a search of {seconds:g} s waits for it {grace(budget):g} s more"
    else:
        most = AFFORDABLE * seconds
        why = f"a search of {seconds:g} s spends at most {most:g} s on that"
    if backend.compile_seconds <= most:
        return None
    return f"{took}, and {why}; allow more seconds or name it with --backends"
