"""What is printed of a tuning when it is done."""

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from tilewise.domain.trial import Outcome

if TYPE_CHECKING:
    from tilewise.tuner.tune import Verdict


def lines(verdict: "Verdict", named: Collection[str] = ()) -> list[str]:
    """Return the reason, what was tried with what outcome, and where the seconds went.

    Of `named` backends also why they were not tried.
    """
    answer, spent = verdict.answer, verdict.spent
    outcomes = Counter(trial.outcome for trial in verdict.trials)
    tried = ", ".join(f"{count} {outcome.value.replace('_', ' ')}" for outcome, count in outcomes.most_common())
    taken = f", {verdict.resumed} of an earlier run" if verdict.resumed else ""
    found = [
        f"{answer.problem.key}: {answer.evidence.reason if answer.evidence else ''}",
        f"  trials: {tried}{taken}",
        f"  seconds: {spent.start:.1f} to start, {spent.prepare:.1f} to prepare, {spent.search:.1f} to search "
        f"(compiling {spent.compile:.1f} and measuring {spent.measure:.1f}, together), {spent.final:.1f} for the final",
    ]
    unsupported = (trial for trial in verdict.trials if trial.outcome is Outcome.UNSUPPORTED)
    found += [f"  {each.candidate}: {each.message}" for each in unsupported if each.candidate.backend in named]
    worst = next((trial for trial in verdict.trials if trial.outcome in BAD), None)
    if worst is not None:
        first = worst.message.strip().partition("\n")[0]
        found.append(f"  the first that went wrong: {worst.candidate}: {worst.outcome.value}: {first}")
    return found


BAD = (Outcome.FAILED, Outcome.WRONG_RESULT, Outcome.WORKER_DIED, Outcome.TIMED_OUT)
