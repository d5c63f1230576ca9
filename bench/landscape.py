"""Landscapes: one kernel's whole search space measured for one problem on one device, kept as compressed JSON lines.

The first line of a file is its Header, each other line a Point. The files lie in bench/landscapes/.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tilewise.domain import codec
from tilewise.domain.config import Candidate, Config
from tilewise.domain.device import Device
from tilewise.domain.errors import SettingsError
from tilewise.domain.problem import Problem
from tilewise.domain.software import Software
from tilewise.domain.space import Constraint, Parameter, SearchSpace
from tilewise.domain.trial import Outcome
from tilewise.kernels.ahead import Footprint

FOLDER = Path("bench/landscapes")
SUFFIX = ".jsonl.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What was measured, where and how.

    - base: the candidate whose config of `role` is what varies; reference: what every ratio is to.
    - torch_ratio: what torch's own choice had in the final of the best, None where it was not measured.
    - parameters: of the space, in its order, with what the feasible configs have; ordered ones are searched so.
    - noise: of the final in which the best were measured again; load: 1-minute load average per core when it began and
      ended, besides which nothing is known of what else the machine did.
    """

    problem: Problem
    device: Device
    device_key: str
    software: Software
    role: str
    kernel: str
    base: Candidate
    reference: Candidate
    torch_ratio: float | None = None
    parameters: tuple[Parameter, ...]
    default: Config
    seed: int
    noise: float
    load: tuple[float, float]
    seconds: float
    command: str
    started: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One config: its ratio to the reference where the outcome is ok, and what it cost in wall seconds.

    `again`: measured once more, in the final of the best. Footprints are of the kernels compiled ahead for it.
    """

    config: Config
    outcome: Outcome
    ratio: float | None
    spread: float | None = None
    samples: int = 0
    again: bool = False
    compile_seconds: float = 0.0
    seconds: float = 0.0
    footprints: tuple[Footprint, ...] = ()
    message: str = ""


@dataclass(frozen=True, slots=True)
class Landscape:
    header: Header
    points: tuple[Point, ...]

    @property
    def name(self) -> str:
        return f"{self.header.kernel}.{self.header.problem.key}"

    @property
    def best(self) -> float:
        """The ratio of the best config."""
        return min(point.ratio for point in self.points if point.ratio is not None)

    @property
    def space(self) -> SearchSpace:
        """The space of the recorded configs, all of them and no others."""
        header, recorded = self.header, frozenset(point.config for point in self.points)
        names = [parameter.name for parameter in header.parameters]
        return SearchSpace(
            kernel=header.kernel,
            parameters=header.parameters,
            default=header.default,
            constraints=(_recorded(header.kernel, names, recorded),),
        )


def _recorded(kernel: str, names: list[str], recorded: frozenset[Config]) -> Constraint:
    return Constraint(
        "it was not feasible when the landscape was recorded",
        lambda values: Config.of(kernel, **{name: values[name] for name in names}) in recorded,
    )


def path_of(folder: Path, kernel: str, problem: Problem, device_key: str) -> Path:
    """Return where a landscape lies in `folder`."""
    return folder / f"{kernel}.{problem.key}.{device_key}{SUFFIX}"


def save(landscape: Landscape, folder: Path) -> Path:
    """Write a landscape into `folder` under its name and device, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    header = landscape.header
    path = path_of(folder, header.kernel, header.problem, header.device_key)
    lines = [codec.canonical(landscape.header), *map(codec.canonical, landscape.points)]
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n", mtime=0))
    return path


def load(path: Path) -> Landscape:
    """Read a landscape. Raises SettingsError for a file that is none, or has no config that is right."""
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
        header = codec.from_json(Header, json.loads(lines[0]))
        points = tuple(codec.from_json(Point, json.loads(line)) for line in lines[1:])
        ratios = [point.ratio for point in points if point.ratio is not None]
        if not ratios or not 0 < min(ratios) <= max(ratios) < math.inf:
            raise ValueError("its configs have no ratios, or none that can be")
    except (OSError, EOFError, ValueError, IndexError, KeyError, TypeError, zlib.error) as error:
        raise SettingsError(f"{path} is no landscape ({error}); record one with `tilewise landscape record`") from error
    return Landscape(header, points)


def load_all(paths: Iterable[Path]) -> tuple[Landscape, ...]:
    """Read the files, and all landscapes of the folders, among `paths`. Raises SettingsError where there is none."""
    given = list(paths)
    files = [file for path in given for file in (sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path])]
    if not files:
        raise SettingsError(
            f"no landscape in {', '.join(map(str, given))}; record one with `tilewise landscape record`"
        )
    return tuple(load(file) for file in files)
