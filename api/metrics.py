"""Prometheus metrics: lookups by match kind, requests and their latency, jobs by state, demand."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tilewise.db.demand import DemandRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.domain.answer import Match
from tilewise.domain.errors import DatabaseError

BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """The metrics of one app; `render` is what /metrics sends."""

    def __init__(self, database: Database) -> None:
        self._registry = CollectorRegistry()
        lookups = Counter("tilewise_lookups", "Answers given, by match", ["match"], registry=self._registry)
        self._lookups = {str(match): lookups.labels(str(match)) for match in Match}
        self._requests = Counter(
            "tilewise_requests", "Requests", ["method", "route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "tilewise_request_seconds", "Time to the end of a response", ["route"], buckets=BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        self._counters: dict[tuple[str, str, int], Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        self._registry.register(_Kept(database))

    def lookup(self, match: str, number: int = 1) -> None:
        self._lookups[match].inc(number)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request. `route` is the pattern that matched, so that there are few of them."""
        counter = self._counters.get((method, route, status))
        if counter is None:
            counter = self._counters[method, route, status] = self._requests.labels(method, route, str(status))
        counter.inc()
        histogram = self._histograms.get(route)
        if histogram is None:
            histogram = self._histograms[route] = self._seconds.labels(route)
        histogram.observe(seconds)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Kept(Collector):
    """What the database knows, read when somebody asks."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        try:
            with self._database.read() as session:
                jobs = JobRepository(session).counts()
                demand = DemandRepository(session).totals()
        except DatabaseError:  # the metrics of the process are wanted most when its database is away
            return
        states = GaugeMetricFamily("tilewise_jobs", "Jobs by state", labels=["state"])
        for state, number in jobs.items():
            states.add_metric([state], number)
        calls = CounterMetricFamily("tilewise_demand_calls", "Calls that clients reported, by match", labels=["match"])
        for match, number in demand.items():
            calls.add_metric([match], number)
        yield states
        yield calls

    def describe(self) -> Iterator[GaugeMetricFamily]:
        return iter(())  # without this, registering would read the database
