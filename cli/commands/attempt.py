"""tilewise try."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import out, print_json, print_table
from ..options import AsJson, DeviceName

if TYPE_CHECKING:
    from tilewise.domain.config import Candidate


def attempt(
    key: Annotated[str, typer.Argument(help="Problem key.")],
    candidate: Annotated[
        str, typer.Option(help="JSON of the candidate, as a trial's page of the dashboard and --json print it.")
    ],
    device: DeviceName = "auto",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved calls of each in the final.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of the final at most.")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Check one candidate and time it beside torch's own choice; nothing is kept. Exit code 1 where it is not right."""
    from tilewise.domain.problem import Problem

    problem, wanted = Problem.parse(key), _candidate(candidate)
    from ..torch import need_torch

    need_torch()
    from tilewise.domain.trial import Outcome
    from tilewise.kernels import device as devices
    from tilewise.tuner.crew import Crew
    from tilewise.tuner.one import try_one

    with Crew(devices.select(device)) as crew:
        found = try_one(problem, wanted, crew=crew, rounds=rounds, seconds=seconds, seed=seed)
    trial = found.trial
    if as_json:
        print_json({"trial": trial, "finalists": found.finalists, "final": found.final})
    else:
        out.print(f"{trial.outcome}  {trial.candidate}" + (f": {trial.message}" if trial.message else ""), markup=False)
        if found.final is not None:
            rows = [
                (str(each), f"{time.median_ms:.4f}", f"{time.p20_ms:.4f} to {time.p80_ms:.4f}", f"{time.ratio:.4f}")
                for each, time in zip(found.finalists, found.final.measurements, strict=True)
            ]
            print_table(f"noise {found.final.noise:.2%}", ("candidate", "ms", "20th to 80th percentile", "ratio"), rows)
    if trial.outcome is not Outcome.OK:
        raise typer.Exit(1)


def _candidate(text: str) -> "Candidate":
    from tilewise.domain.config import Candidate
    from tilewise.domain.errors import SettingsError

    try:
        return Candidate.from_json(json.loads(text))
    except ValueError as error:
        raise SettingsError(f"--candidate: {error}") from error
