"""tilewise landscape: record whole search spaces on a device, and replay searches over them without one."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import err, out
from ..options import DeviceName, writable_folder

if TYPE_CHECKING:
    from tilewise.bench.landscape import Point

app = typer.Typer(no_args_is_help=True, help="Whole search spaces, recorded on a device and replayed without one.")
FOLDER = Path("bench/landscapes")
METHODS = "random,tpe,cmaes,surrogate"


@app.command("record")
def record_command(
    problem: Annotated[list[str], typer.Option(metavar="KEY", help="Problem key; may be repeated.")],
    backend: Annotated[str, typer.Option(help="Whose space: triton, triton_decode, cpu_tiled, flex, flash_cute.")],
    role: Annotated[str, typer.Option(help="Which config varies: forward, dkdv or dq.")] = "forward",
    kernel: Annotated[str | None, typer.Option(help="Of a role with several kernels; else the role's own.")] = None,
    device: DeviceName = "auto",
    folder: Annotated[Path, typer.Option("--output", help="Folder for the files.")] = FOLDER,
    compilers: Annotated[int | None, typer.Option(min=1, help="Processes that compile ahead.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
) -> None:
    """Measure every config of a kernel's search space, and keep all of it.

    Every config is checked against float64 and screened beside the backend's default; the best 5% are measured again,
    in one interleaved final.
    """
    writable_folder(folder, "--output")
    from ..torch import need_torch

    need_torch()
    from tilewise.tuner.processes import prestart

    prestart()
    from tilewise.bench.landscape import save
    from tilewise.bench.record import Subject, record
    from tilewise.domain.problem import Problem
    from tilewise.kernels import device as devices
    from tilewise.tuner.crew import Crew

    subjects = [Subject(problem=Problem.parse(key), backend=backend, role=role, kernel=kernel) for key in problem]
    command = " ".join(["tilewise", *sys.argv[1:]])
    with Crew(devices.select(device), compilers=compilers) as crew:
        for subject in subjects:
            found = record(subject, crew, seed=seed, command=command, tell=_tell)
            path = save(found, folder)
            right = sum(point.ratio is not None for point in found.points)
            out.print(
                f"{path}: {len(found.points)} configs, {right} right, best {found.best:.4f} of the default, "
                f"{found.header.seconds:.0f} s",
                markup=False,
            )


@app.command("replay")
def replay_command(
    landscapes: Annotated[list[Path] | None, typer.Argument(help="Files or folders; else bench/landscapes.")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated: random, tpe, gp, cmaes, surrogate.")] = METHODS,
    seeds: Annotated[int, typer.Option(min=1, help="Searches of each kind on each landscape.")] = 50,
    most: Annotated[int | None, typer.Option(min=1, help="Trials of a search at most.")] = None,
    compilers: Annotated[int, typer.Option(min=1, help="Simulated processes that compile ahead.")] = 15,
    output: Annotated[Path, typer.Option(help="Writes this .json, .md and .png.")] = Path("bench/results/replay"),
) -> None:
    """Search recorded landscapes many times, and write how soon each way to search finds how much.

    No device is needed. Each method starts cold; the surrogate also warm, from searches of the other landscapes of the
    same kernel and device.
    """
    from tilewise.bench.landscape import load_all
    from tilewise.bench.replay import contenders_of, replay_all
    from tilewise.bench.replay_report import page, summarise, write

    found = load_all(landscapes or [FOLDER])
    writable_folder(output.parent, "--output")
    contenders = contenders_of([name.strip() for name in methods.split(",") if name.strip()])
    runs = replay_all(found, contenders, seeds, compilers=compilers, most=most)
    command = " ".join(["tilewise", *sys.argv[1:]])
    report = summarise(found, runs, command=command, compilers=compilers, most=most)
    files = write(report, runs, output)
    out.print(page(report, files[2].name), markup=False)
    err.print("written: " + ", ".join(map(str, files)), markup=False)


def _tell(done: int, every: int, point: "Point") -> None:
    if done % 50 == 0 or done == every:
        err.print(f"{done}/{every} configs, the last: {point.config}, {point.outcome}", markup=False)
