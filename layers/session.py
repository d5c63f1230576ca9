"""The process's settings and its client per device: what `attention` and the layers ask.

tilewise.configure(source="http://tilewise.internal:8000")
tilewise.ready()                    # before the first step: fetch, verify, seal
tilewise.answer(problem)            # what would run here, and why
tilewise.refresh()                  # the only thing that changes the answers afterwards
"""

import threading

import torch

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.client.table import SealedTable
from tilewise.domain.answer import Answer
from tilewise.domain.problem import Problem
from tilewise.kernels import device as devices

_lock = threading.RLock()
_settings: Settings | None = None
_clients: dict[torch.device, Client] = {}
# Counts every change of the answers: what was resolved under an older number is resolved again.
generation = 0


def configure(
    source: str | None = None, *, snapshot: str | None = None, token: str | None = None, timeout: float | None = None
) -> None:
    """Say where answers come from; what is left out comes from TILEWISE_SOURCE, _SNAPSHOT, _TOKEN and _TIMEOUT.

    - source: `http(s)://...`, `sqlite:///...`, `postgresql://...` or the path of a snapshot.
    - snapshot: what this run pins: a snapshot's path or its 64-digit id.
    - timeout: seconds that the source has in all.

    Nothing is asked yet. Raises SettingsError for values that make no sense.
    """
    global _settings
    settings = Settings.from_environment(source=source, snapshot=snapshot, token=token, timeout=timeout)
    with _lock:
        _settings = settings
        _clients.clear()
        _changed()


def ready(timeout: float | None = None, *, device: torch.device | str = "auto") -> SealedTable:
    """Fetch the answers for `device`, verify and seal them for this run, in at most `timeout` seconds.

    Where the source fails, one warning is logged and the run goes on with the last good answers or the default.
    Raises SnapshotError only where a pinned snapshot cannot be had.
    """
    with _lock:
        table = client_for(device).ready(timeout)
        _changed()
        return table


def refresh(timeout: float | None = None, *, device: torch.device | str = "auto") -> SealedTable:
    """Fetch again and seal what came; where that fails, one warning is logged and the old answers stay."""
    with _lock:
        table = client_for(device).refresh(timeout)
        _changed()
        return table


def answer(problem: Problem, device: torch.device | str = "auto") -> Answer:
    """Return what would run for `problem` on `device` of this machine, and how far that can be trusted."""
    return client_for(device).answer(problem)


def client_for(device: torch.device | str) -> Client:
    """Return this process's client for `device`; makes it at the first call, without I/O."""
    where = devices.select(device) if isinstance(device, str) else device
    if str(where) == "cuda":
        where = torch.device("cuda", torch.cuda.current_device())
    client = _clients.get(where)
    if client is None:
        with _lock:
            described = devices.describe(where)
            settings = _settings or Settings.from_environment()
            client = _clients.setdefault(where, Client(described.key, devices.software(described.kind), settings))
    return client


def _changed() -> None:
    global generation
    generation += 1
