"""The process's settings and its client per device: what `attention` and the layers ask.

tilewise.configure(source="http://tilewise.internal:8000")
tilewise.ready()                    # before the first step: fetch, verify, agree with all ranks, seal
tilewise.warmup(problems)           # compile and try what will run, and demote what fails, on all ranks alike
tilewise.answer(problem)            # what would run here, and why
tilewise.refresh()                  # the only thing that changes the answers afterwards
"""

import threading
from collections.abc import Callable

import torch
import torch.distributed as dist

from tilewise.client.client import Client
from tilewise.client.settings import Settings
from tilewise.client.table import SealedTable
from tilewise.client.usage import Used
from tilewise.domain.answer import Answer
from tilewise.domain.errors import DeviceError, SettingsError, SnapshotError
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot
from tilewise.kernels import device as devices

from .agreement import Group, from_first, group_of, together

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
    - snapshot: what this run pins: a snapshot's 64-digit id, a channel of the service or database, or a file's path.
    - timeout: seconds that the source has in all.

    Nothing is asked yet. Raises SettingsError for values that make no sense.
    """
    global _settings
    settings = Settings.from_environment(source=source, snapshot=snapshot, token=token, timeout=timeout)
    with _lock:
        _settings = settings
        _clients.clear()
        _changed()


def ready(timeout: float | None = None, group: Group = None, *, device: torch.device | str = "auto") -> SealedTable:
    """Fetch the answers for `device`, verify and seal them for this run, in at most `timeout` seconds.

    Where torch.distributed runs, this is collective over `group` (by default all ranks): the first rank fetches, the
    others seal what it sends them, so that every rank uses the same answers. Where the source fails, one warning is
    logged and the run goes on with the last good answers or the default. Raises SnapshotError, then on every rank, only
    where a pinned snapshot cannot be had; and where one rank cannot take part, its own error there and AgreementError
    on the others.
    """
    return _sealed(lambda client: client.ready(timeout), group, device)


def refresh(timeout: float | None = None, group: Group = None, *, device: torch.device | str = "auto") -> SealedTable:
    """Fetch again and seal what came; where that fails, one warning is logged and the old answers stay.

    Collective like `ready`. A forward from before that activation checkpointing computes again in a backward after it
    still runs what it ran.
    """
    return _sealed(lambda client: client.refresh(timeout), group, device)


def _sealed(fetch: Callable[[Client], SealedTable], group: Group, device: torch.device | str) -> SealedTable:
    ranks = group_of(group)
    with _lock:
        if ranks is None:
            table = fetch(client_for(device))
        else:
            client = together(ranks, lambda: client_for(device))
            sent = from_first(ranks, lambda: fetch(client).snapshot.dumps(), SnapshotError)
            table = client.seal(Snapshot.loads(sent, name="what the first rank sent"), origin="the first rank")
            if dist.get_rank(ranks):  # the first one's does already; each rank tells what it used itself
                client.follow(failed=False)
        _changed()
        return table


def used(problem: Problem, device: torch.device) -> Used:
    """Return the counter of the answer that decides what runs for `problem`."""
    try:
        client = client_for(device)
    except (DeviceError, SettingsError):  # no answers here, and `resolve` has said so
        return Used.nobodys()
    return client.used(client.table.lookup(problem))


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
