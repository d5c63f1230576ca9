"""tilewise doctor."""

from dataclasses import dataclass

from tilewise.domain.device import Device, DeviceKind
from tilewise.domain.problem import Dtype, Problem
from tilewise.domain.software import Software

from ..console import out, print_json, print_table
from ..options import AsJson, DeviceName


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendReport:
    name: str
    reason: str | None  # why it is not available; None when it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What this machine has; `probe` is the problem that each backend was asked about."""

    device: Device
    device_key: str
    software: Software
    probe: Problem
    backends: tuple[BackendReport, ...]
    data_folder: str
    source: str


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
    )
