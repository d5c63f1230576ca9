"""tilewise answer."""

from typing import TYPE_CHECKING, Annotated

import typer

from ..console import out, print_json, print_table
from ..options import AsJson, Db, database_url

if TYPE_CHECKING:
    from tilewise.domain.answer import Answer
    from tilewise.domain.problem import Problem


def answer(
    key: Annotated[str, typer.Argument(help="Problem key, e.g. inference.fp16.b1.h64.kv8.q4096.k4096.d128.causal")],
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:N, or the key of any device.")] = "auto",
    source: Annotated[str | None, typer.Option(help="Ask this service or snapshot instead of the database.")] = None,
    db: Db = None,
    as_json: AsJson = False,
) -> None:
    """One answer: what to run for a problem, with the evidence it rests on."""
    from tilewise.domain.problem import Problem

    found = _find(Problem.parse(key), device, source, db)
    if as_json:
        print_json(found)
        return
    out.print(f"problem    {found.problem.key}\ndevice     {found.device_key}", markup=False)
    out.print(
        f"run        {found.plan}\nmatch      {found.match}{', ' + found.missed if found.missed else ''}", markup=False
    )
    if found.measured is not None and (found.measured != found.problem or found.measured_on):
        where = f" on {found.measured_on}" if found.measured_on else ""
        out.print(f"measured   {found.measured.key}{where}", markup=False)
    if found.regret:
        out.print(f"regret     at most {found.regret:.0%} slower than the best plan, 9 times in 10", markup=False)
    evidence = found.evidence
    if evidence is None:
        out.print(f"next       tilewise tune --problem {found.problem.key}", markup=False)
        return
    out.print(f"why        {evidence.reason}", markup=False)
    out.print(
        f"evidence   {evidence.trials} trials ({evidence.failed} failed), final of {evidence.measured:%Y-%m-%d %H:%M} "
        f"UTC, noise {evidence.noise:.2%}, version {found.version}"
    )
    rows = [
        (str(item.candidate), f"{item.measurement.median_ms:.4f}", f"{item.measurement.ratio:.3f}")
        for item in evidence.finalists
    ]
    print_table("", ("final", "ms", f"ratio to {evidence.reference}"), rows)


def _find(problem: "Problem", device: str, source: str | None, db: str | None) -> "Answer":
    from tilewise.domain.device import check_device_key
    from tilewise.domain.matching import by_device, match, predictors
    from tilewise.domain.software import Software

    software: Software | None = None
    if "." in device:
        device_key = check_device_key(device)
    else:
        from ..torch import need_torch

        need_torch()
        from tilewise.kernels import device as devices

        described = devices.describe(devices.select(device))
        device_key, software = described.key, devices.software(described.kind)
    if source is not None:
        from tilewise.client.settings import Settings
        from tilewise.client.sources import open_source

        settings = Settings.from_environment(source=source)
        snapshot = open_source(source, token=settings.token).fetch(device_key, timeout=settings.timeout)
    else:
        from tilewise.db.answers import AnswerRepository
        from tilewise.db.session import Database

        with Database.open(database_url(db), upgrade=False) as database, database.read() as session:
            snapshot = AnswerRepository(session).snapshot(device_key)
    kept = by_device(snapshot.answers)
    return match(problem, device_key, software, kept.get(device_key, {}), predictors(device_key, kept))
