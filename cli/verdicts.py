"""How an answer looks as a row of a table."""

from tilewise.domain.answer import Answer

COLUMNS = ("problem", "device", "default ms", "best ms", "speed-up", "backend", "config", "trials", "version")


def row(answer: Answer) -> tuple[str, ...]:
    """Return the cells of COLUMNS for an answer that was measured."""
    return (
        answer.problem.key,
        answer.device_key,
        _number(answer.baseline_ms),
        _number(answer.expected_ms),
        "" if answer.speedup is None else f"{answer.speedup:.2f}x",
        answer.plan.forward.backend,
        str(answer.plan.forward.config() or "-"),
        str(answer.evidence.trials if answer.evidence else 0),
        str(answer.version),
    )


def _number(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{milliseconds:.4g}"
