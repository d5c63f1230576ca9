"""Draws a search: every right trial, and the best so far."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from tilewise.domain.answer import Answer
from tilewise.domain.trial import Outcome, Trial


def plot(answer: Answer, trials: Sequence[Trial], path: Path) -> None:
    """Write a picture of `trials`, in the order in which they ended, with what won; ratios to torch's own choice.

    What failed is marked at the upper edge, and so is what is much slower than the rest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ordered = sorted((t for t in trials if t.outcome not in (Outcome.UNSUPPORTED, Outcome.SKIPPED)), key=_when)
    ratios = [t.measurement.ratio if t.measurement and t.outcome is Outcome.OK else None for t in ordered]
    known = [ratio for ratio in ratios if ratio is not None]
    top = min(max(known), 4 * min(known)) * 1.1
    figure, axis = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    for color, backend in enumerate(dict.fromkeys(trial.candidate.backend for trial in ordered)):
        mine = [(n, ratio) for n, (t, ratio) in enumerate(zip(ordered, ratios, strict=True), 1) if _of(t, backend)]
        right = [(n, ratio) for n, ratio in mine if ratio is not None and ratio <= top]
        slow = [(n, top) for n, ratio in mine if ratio is not None and ratio > top]
        failed = [(n, top) for n, ratio in mine if ratio is None]
        shade_of = f"C{color % 10}"
        for places, marker, shade in ((right, "o", shade_of), (slow, "^", shade_of), (failed, "x", "0.4")):
            label = backend if marker == "o" else None
            axis.scatter([n for n, _ in places], [r for _, r in places], s=18, marker=marker, color=shade, label=label)
    best = list(itertools.accumulate((top if ratio is None else ratio for ratio in ratios), min))
    axis.step(range(1, len(best) + 1), best, where="post", color="0.2", linewidth=1.2, label="best so far")
    axis.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    axis.set(
        xlabel="trial (x: failed, triangle: slower than shown)",
        ylabel="time / torch's own choice",
        ylim=(0, top * 1.05),
    )
    axis.set_title(f"{answer.problem.key}\n{answer.plan}", fontsize=9, loc="left")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _when(trial: Trial) -> float:
    return trial.when.timestamp()


def _of(trial: Trial, backend: str) -> bool:
    return trial.candidate.backend == backend
