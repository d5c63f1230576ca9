"""Commands that people copy from a page."""

import json
import shlex

from tilewise.domain import codec
from tilewise.domain.config import Candidate
from tilewise.domain.job import BUDGETS, Budget
from tilewise.domain.problem import Problem


def tune(problem: Problem, budget: Budget | None) -> str:
    """Return the command that tunes a problem from nothing, with the limits of `budget` (None: the usual ones)."""
    words = ["tilewise", "tune", "--problem", problem.key, "--fresh"]
    if budget is not None:
        named = BUDGETS.get(budget.name)
        words += ["--budget", budget.name] if named else []
        if named is None or budget.trials != named.trials:
            words += ["--trials", str(budget.trials)]
        if named is None or budget.seconds != named.seconds:
            words += ["--seconds", f"{budget.seconds:g}"]
    return shlex.join(words)


def attempt(problem: Problem, candidate: Candidate) -> str:
    """Return the command that checks and times one candidate beside torch's own choice."""
    text = json.dumps(codec.to_json(candidate), separators=(",", ":"))
    return shlex.join(["tilewise", "try", problem.key, "--candidate", text])
