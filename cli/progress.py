"""Shows a running tuning: a live line on a terminal, a plain log elsewhere."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

from .console import err

if TYPE_CHECKING:
    from tilewise.domain.trial import Trial
    from tilewise.tuner.progress import Progress


class Watcher:
    """Called with every Progress; keeps the number of finished trials."""

    def __init__(self, title: str) -> None:
        self.trials = 0
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
        yield watcher
    finally:
        watcher.stop()


def _state(progress: "Progress") -> str:
    if progress.phase == "prepare":
        return "computing the reference"
    parts = [_best(progress)]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append("final" if progress.phase == "final" else f"{progress.seconds_left:.0f} s left")
    if progress.phase == "done":
        parts[-1] = "done"
    return ", ".join(filter(None, parts))


def _best(progress: "Progress") -> str:
    best, baseline = _ms(progress.best), _ms(progress.baseline)
    if progress.best is None or best is None:
        return ""
    found = f"best {progress.best.candidate} {best:.4g} ms"
    if baseline is None or progress.baseline is None or progress.best.candidate == progress.baseline.candidate:
        return found
    return f"{found}, {baseline / best:.2f} times as fast as {progress.baseline.candidate}"


def _ms(trial: "Trial | None") -> float | None:
    return trial.measurement.median_ms if trial is not None and trial.measurement is not None else None
