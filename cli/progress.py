"""Shows a running tuning: a live line on a terminal, a plain log elsewhere."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from .console import err

if TYPE_CHECKING:
    from tilewise.domain.trial import Trial
    from tilewise.tuner.progress import Progress


class Watcher:
    """Called with every Progress; keeps the number of finished trials.

    Raises KeyboardInterrupt where there was a Ctrl-C before: some code swallows it, while it imports for instance.
    """

    def __init__(self, title: str) -> None:
        self.trials = 0
        self.interrupted = False
        self._title = title
        self._bar: Bar | None = None
        self._logged = ""
        if err.is_terminal:
            self._bar = Bar(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[state]}"),
                console=err,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None, state="preparing")
            self._bar.start()

    def __call__(self, progress: "Progress") -> None:
        self.trials = progress.trials
        if self.interrupted:
            raise KeyboardInterrupt
        state = _state(progress)
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.trials, total=progress.total, state=state)
        elif progress.phase != "search" or _best(progress) != self._logged:
            self._logged = _best(progress)
            err.print(f"{self._title}: {progress.trials}/{progress.total} trials, {state}", markup=False)

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def watching(title: str) -> Iterator[Watcher]:
    watcher = Watcher(title)
    try:
        with _noting_interrupts(watcher):
            yield watcher
    finally:
        watcher.stop()


@contextlib.contextmanager
def _noting_interrupts(watcher: Watcher) -> Iterator[None]:
    """Let the watcher know of a Ctrl-C, which raises KeyboardInterrupt as ever; not where it does something else."""
    plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not plain or threading.current_thread() is not threading.main_thread():
        yield
        return

    def noted(number: int, frame: FrameType | None) -> None:
        watcher.interrupted = True
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, noted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _state(progress: "Progress") -> str:
    if progress.phase == "prepare":
        return "computing the reference"
    counts = (
        (progress.compiled, "compiled ahead"),
        (progress.waiting, "on their way"),
        (progress.infeasible, "infeasible"),
        (progress.failed, "failed"),
    )
    parts = [_best(progress), *(f"{number} {what}" for number, what in counts if number)]
    parts.append({"final": "final", "done": "done"}.get(progress.phase, f"{progress.seconds_left:.0f} s left"))
    return ", ".join(filter(None, parts))


def _best(progress: "Progress") -> str:
    best = _ms(progress.best)
    if progress.best is None or best is None:
        return ""
    found = f"best {progress.best.candidate} {best:.4g} ms"
    against = dict.fromkeys(filter(None, (progress.baseline, progress.default)))
    for other in against:
        if other.candidate != progress.best.candidate and (gain := _gain(progress.best, other)) is not None:
            found += f", {gain:.2f} times as fast as {other.candidate}"
    return found


def _gain(best: "Trial", other: "Trial") -> float | None:
    """Return how many times as fast as `other` it is, by their ratios to one reference: their times are of two runs."""
    mine, theirs = (trial.measurement.ratio if trial.measurement else None for trial in (best, other))
    return theirs / mine if mine and theirs else None


def _ms(trial: "Trial | None") -> float | None:
    return trial.measurement.median_ms if trial is not None and trial.measurement is not None else None
