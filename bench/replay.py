"""Replays searches over recorded landscapes, without the device they were recorded on.

The way of a candidate through compilers and the measuring process is simulated with the recorded seconds: as in
`tuner.crew`, candidates that compile are asked for ahead, one more than there are compilers; others one at a time.
"""

import heapq
import importlib.util
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from tilewise.domain.config import Config
from tilewise.domain.errors import SettingsError
from tilewise.tuner.search import Method, Search
from tilewise.tuner.surrogate import Neighbour

from .landscape import Landscape, Point

SHARES = (0.95, 0.97, 0.99)  # of the optimum
AFTER = (10, 20, 40)  # trials
NEEDED = {Method.GP: "scipy", Method.CMAES: "cmaes"}  # of Optuna's samplers
NEIGHBOUR_TRIALS = 40  # what a search of a near problem has left behind
NEIGHBOUR_FIRST = 2  # the best configs of each neighbour, tried before anything else


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to search: a method, warm-started from the other landscapes of the same kernel or not."""

    method: Method
    warm: bool = False

    def __str__(self) -> str:
        return f"{self.method}, warm" if self.warm else str(self.method)


def contenders_of(methods: Sequence[str]) -> tuple[Contender, ...]:
    """Return the named methods, each cold, and warm where it can learn from neighbours.

    Raises SettingsError for an unknown one, and for one whose package is not installed.
    """
    found = []
    for name in methods:
        if name not in list(Method):
            raise SettingsError(f"unknown method {name!r}; expected some of {', '.join(Method)}")
        method = Method(name)
        package = NEEDED.get(method)
        if package is not None and importlib.util.find_spec(package) is None:
            raise SettingsError(f"the method {name} needs {package}: pip install 'tilewise[bench]'")
        found.append(Contender(method))
        if method is Method.SURROGATE:
            found.append(Contender(method, warm=True))
    return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """After so many trials and simulated seconds the best found has this share of the optimum's speed."""

    trials: int
    seconds: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One search: only the steps at which it found something better."""

    contender: Contender
    landscape: str
    seed: int
    steps: tuple[Step, ...]
    trials: int

    def trials_to(self, share: float) -> float:
        """Return how many trials it took to a share of the optimum; infinite where it did not get there."""
        return next((float(step.trials) for step in self.steps if step.share >= share), math.inf)

    def seconds_to(self, share: float) -> float:
        return next((step.seconds for step in self.steps if step.share >= share), math.inf)

    def share_after(self, trials: int) -> float:
        return max((step.share for step in self.steps if step.trials <= trials), default=0.0)


def replay(
    landscape: Landscape,
    contender: Contender,
    seed: int,
    *,
    near: Sequence[Landscape] = (),
    compilers: int = 15,
    most: int | None = None,
) -> Run:
    """Search a landscape, beginning with the kernel's default, until nothing that is reported can change.

    That is when its optimum is found, or the last of SHARES and of AFTER are reached, or `most` trials are done.

    - near: landscapes to warm-start from; what is known of each is what a cold search of it left behind.
    """
    neighbours, first = [], []
    for other in near:
        found = _left_behind(other, seed)
        neighbours.append(Neighbour(tuple(found)))
        first += [config for config, _ in sorted(found, key=lambda pair: pair[1])[:NEIGHBOUR_FIRST]]
    search = Search(landscape.space, seed=seed, method=contender.method, first=first, neighbours=neighbours)
    steps: list[Step] = []
    share, trials = 0.0, 0
    for trials, (point, seconds) in enumerate(_trials(landscape, search, compilers), 1):
        if point.ratio is not None and landscape.best / point.ratio > share:
            share = landscape.best / point.ratio
            steps.append(Step(trials=trials, seconds=round(seconds, 3), share=round(share, 6)))
        if share >= 1 or trials == most or (share >= SHARES[-1] and trials >= AFTER[-1]):
            break
    return Run(contender=contender, landscape=landscape.name, seed=seed, steps=tuple(steps), trials=trials)


def _left_behind(landscape: Landscape, seed: int) -> list[tuple[Config, float]]:
    search = Search(landscape.space, seed=seed)
    found = []
    for number, (point, _) in enumerate(_trials(landscape, search, compilers=0), 1):
        if point.ratio is not None:
            found.append((point.config, math.log(point.ratio)))
        if number == NEIGHBOUR_TRIALS:
            break
    return found


def _trials(landscape: Landscape, search: Search, compilers: int) -> Iterator[tuple[Point, float]]:
    """Yield what is tried, in the order in which it ends, with the simulated time; tells the search of it before."""
    points = {point.config: point for point in landscape.points}
    ahead = compilers if any(point.compile_seconds for point in landscape.points) else 0
    clock, device_free = 0.0, 0.0
    compiling: list[tuple[float, int, Point]] = []  # when it ends, a number, what
    ready: deque[tuple[float, Point]] = deque()  # since when
    asked = 0

    def ask(first: Config | None = None) -> bool:
        nonlocal asked
        config = first or search.ask()
        if config is None:
            return False
        asked += 1
        point = points[config]
        heapq.heappush(compiling, (clock + (point.compile_seconds if ahead else 0.0), asked, point))
        return True

    search.tell(landscape.header.default, None if (d := points[landscape.header.default]).ratio is None else d.ratio)
    device_free = d.compile_seconds + d.seconds
    yield d, device_free
    clock = d.compile_seconds
    while True:
        while len(compiling) + len(ready) < ahead + 1 and ask():
            pass
        if not compiling and not ready:
            return
        while compiling and (not ready or compiling[0][0] <= max(device_free, ready[0][0])):
            end, _, point = heapq.heappop(compiling)
            if point.seconds == 0 and point.ratio is None:  # it did not compile
                clock = max(clock, end)
                search.tell(point.config, None)
                yield point, clock
                break
            ready.append((end, point))
        else:
            since, point = ready.popleft()
            device_free = max(device_free, since) + point.seconds
            clock = device_free
            search.tell(point.config, point.ratio)
            yield point, clock


def replay_all(
    landscapes: Sequence[Landscape],
    contenders: Sequence[Contender],
    seeds: int,
    *,
    compilers: int = 15,
    most: int | None = None,
    processes: int | None = None,
) -> tuple[Run, ...]:
    """Replay every contender over every landscape with seeds 0, 1, ..., in parallel.

    A warm contender is left out where no other landscape has the same kernel and device.
    """
    jobs = [
        (landscape, contender, seed, tuple(near), compilers, most)
        for landscape in landscapes
        for contender in contenders
        if (near := _near(landscape, landscapes) if contender.warm else []) or not contender.warm
        for seed in range(seeds)
    ]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # one process a core: numpy's own threads would fight
        os.environ.setdefault(name, "1")
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return tuple(pool.map(_one, jobs, chunksize=max(1, seeds // 5)))


_Job = tuple[Landscape, Contender, int, tuple[Landscape, ...], int, int | None]


def _one(job: _Job) -> Run:
    landscape, contender, seed, near, compilers, most = job
    return replay(landscape, contender, seed, near=near, compilers=compilers, most=most)


def _near(landscape: Landscape, landscapes: Sequence[Landscape]) -> list[Landscape]:
    mine = landscape.header
    return [
        other
        for other in landscapes
        if other.name != landscape.name
        and (other.header.kernel, other.header.device_key, other.header.role)
        == (mine.kernel, mine.device_key, mine.role)
    ]
