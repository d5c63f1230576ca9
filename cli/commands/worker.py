"""tilewise worker."""

import os
import signal
import subprocess
import sys
import threading
from typing import Annotated

import typer

from ..console import err
from ..options import Db, database_url

MAX_BACKOFF = 60.0


def worker(
    device: Annotated[str, typer.Option(help="all, cpu, cuda or cuda:N; all: every GPU here, else the CPU.")] = "all",
    jobs: Annotated[int | None, typer.Option(min=1, help="Run so many jobs and end.")] = None,
    drain: Annotated[bool, typer.Option("--drain", help="End when no job waits.")] = False,
    lease: Annotated[float, typer.Option(min=1, help="Seconds after which a worker without a sign is lost.")] = 30.0,
    here: Annotated[bool, typer.Option("--here", help="Run the jobs in this process, without a child.")] = False,
    db: Db = None,
) -> None:
    """Claim queued jobs and run them on this machine's devices, one child process for each."""
    from ..torch import need_torch

    need_torch()
    import torch

    from tilewise.kernels import device as devices

    url = database_url(db)
    if here:
        _work(device, url, jobs, drain, lease)
        return
    if device == "all":
        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]
    else:
        names = [str(devices.select(device))]
    stop = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: stop.set())
    options = ["--lease", str(lease), *(["--drain"] if drain else []), *(["--jobs", str(jobs)] if jobs else [])]
    threads = [threading.Thread(target=_keep_up, args=(name, url, options, stop)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():  # a join without a limit would not let the signals through
            thread.join(0.5)


def _keep_up(name: str, url: str, options: list[str], stop: threading.Event) -> None:
    """Run a child for one device, and another after each that dies; the wait grows while they die at once."""
    command = [sys.executable, "-m", "tilewise.cli.main", "worker", "--here", "--device", name, *options]
    wait = 1.0
    while not stop.is_set():
        # the URL may hold a password, which the command line of a process would show to everybody; the session of its
        # own keeps a Ctrl-C on the terminal from reaching the child twice
        environment = {**os.environ, "TILEWISE_DB": url}
        with subprocess.Popen(command, env=environment, start_new_session=True) as child:
            while child.poll() is None:
                if stop.wait(0.2):
                    child.send_signal(signal.SIGINT)
                    break
        if child.returncode == 0 or stop.is_set():
            return
        err.print(f"worker of {name} ended with {child.returncode}; another starts in {wait:.0f} s", markup=False)
        stop.wait(wait)
        wait = min(MAX_BACKOFF, wait * 2)


def _work(device: str, url: str, jobs: int | None, drain: bool, lease: float) -> None:
    import logging
    import socket

    from tilewise.db.devices import DeviceRepository
    from tilewise.db.session import Database
    from tilewise.kernels import device as devices
    from tilewise.tuner.jobs import tuning
    from tilewise.tuner.worker import Worker

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    where = devices.select(device)
    described = devices.describe(where)
    owner = f"{socket.gethostname()}:{os.getpid()} {where}"
    with Database.open(url, upgrade=url.startswith("sqlite")) as database:
        with database.write() as session:
            DeviceRepository(session).save(described)
        err.print(f"{owner} works for {described.key} from {database.url}", markup=False)
        run = tuning(database, where)
        Worker(database, described.key, owner, run, lease=lease).work(threading.Event(), jobs=jobs, drain=drain)
