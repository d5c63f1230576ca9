"""tilewise doctor."""

import importlib.util
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software

from ..console import out, print_json, print_table
from ..options import AsJson, DeviceName

IMPORTED = ("torch", "triton", "sympy", "optuna", "sqlalchemy", "alembic", "cutlass")  # what a tuning waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport:
    name: str
    reason: str | None  # why it is not available; None when it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What this machine has; `probe` is the problem that each backend was asked about.

    `uncompiled` are folders of packages whose modules every process compiles to bytecode again.
    """

    device: Device
    device_key: str
    software: Software
    probe: Problem
    backends: tuple[BackendReport, ...]
    data_folder: str
    source: str
    uncompiled: tuple[str, ...]


def doctor(device: DeviceName = "auto", as_json: AsJson = False) -> None:
    """What this machine has: device, versions, backends, and why each absent one is absent."""
    report = _examine(device)
    if as_json:
        print_json(report)
        return
    out.print(
        f"device     {report.device.name}, {report.device.arch}, {report.device.units} units  ->  {report.device_key}"
    )
    for name, version in (pair.split("@") for pair in report.software.key.split(",")):
        out.print(f"{name.removeprefix('kernel:'):<16}{version}", markup=False)
    out.print(f"data       {report.data_folder}", markup=False)
    out.print(f"answers    {report.source}", markup=False)
    if report.uncompiled:
        out.print(
            "slow start modules without bytecode, compiled again by every process; compile them once:\n"
            f"           python -m compileall -q {shlex.join(report.uncompiled)}",
            markup=False,
            soft_wrap=True,
        )
    rows = [(item.name, "yes" if item.reason is None else "no", item.reason or "") for item in report.backends]
    print_table(f"\nbackends for {report.probe.key}", ("backend", "available", "reason"), rows)


def _examine(name: str) -> Report:
    from tilewise.client import paths
    from tilewise.client.settings import Settings

    from ..torch import need_torch

    need_torch()
    from tilewise.kernels import device as devices
    from tilewise.kernels.backends import BACKENDS

    where = devices.select(name)
    device = devices.describe(where)
    dtype = Dtype.FP32 if device.kind is DeviceKind.CPU else Dtype.FP16
    probe = Problem(dtype=dtype, batch=1, heads=8, q_len=1024, head_dim=64, causal=True)
    settings = Settings.from_environment()
    return Report(
        device=device,
        device_key=device.key,
        software=devices.software(device.kind),
        probe=probe,
        backends=tuple(
            BackendReport(name=backend.name, reason=backend.supports(probe, device)) for backend in BACKENDS.values()
        ),
        data_folder=str(paths.data_dir()),
        source=settings.snapshot or settings.source or str(paths.embedded_snapshot_path()),
        uncompiled=tuple(_uncompiled(IMPORTED)),
    )


def _uncompiled(packages: Iterable[str]) -> list[str]:
    """Return the folders of those packages whose first module has no bytecode, and gets none by being imported."""
    specs = filter(None, map(importlib.util.find_spec, packages))
    first = [Path(spec.origin) for spec in specs if spec.origin and spec.origin.endswith(".py")]
    return [
        str(path.parent)
        for path in first
        if not Path(importlib.util.cache_from_source(path)).exists()
        and (sys.dont_write_bytecode or not os.access(path.parent, os.W_OK))
    ]
