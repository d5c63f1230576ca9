"""How many requests a caller may send: a bucket of tokens that fills at a rate."""

import time

MAX_CALLERS = 10_000


class RateLimit:
    """A rate of 0 limits nothing. Used from the event loop only."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst = rate, float(burst)
        self._buckets: dict[str, tuple[float, float]] = {}

    def wait(self, key: str) -> float:
        """Return 0 and count the request, or the seconds after which the next one is let in."""
        if not self._rate:
            return 0.0
        moment = time.monotonic()
        left, then = self._buckets.get(key, (self._burst, moment))
        left = min(self._burst, left + (moment - then) * self._rate)
        if left < 1:
            return (1 - left) / self._rate
        if len(self._buckets) >= MAX_CALLERS and key not in self._buckets:
            self._buckets.clear()  # callers that nobody knows, each seen once
        self._buckets[key] = (left - 1, moment)
        return 0.0
