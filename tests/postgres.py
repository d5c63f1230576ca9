"""A PostgreSQL from the system's binaries, where the machine has them, that a test may stop, kill and start again."""

import contextlib
import getpass
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Debian keeps the binaries of each version in a folder; the newest comes last.
SYSTEM_POSTGRES = sorted(
    (path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")), key=lambda path: int(path.parent.name)
)


class Server:
    """One server; `url` names its database `postgres` through a socket in `folder`."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self._binaries, self._folder = binaries, folder
        # the server refuses to run as root
        self._user = "postgres" if getpass.getuser() == "root" else None
        owner = self._user or getpass.getuser()
        self.url = f"postgresql://{owner}@/postgres?host={folder}"
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "--auth=trust", "--no-sync", f"--username={owner}", "-D", str(folder / "data"))
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
        self._options = f"{options} -c max_connections=120"
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
def running_postgres(binaries: Path) -> Iterator[Server]:
    """Yield a running server; fails, not skips, where it does not come up."""
    folder = Path(tempfile.mkdtemp(prefix="tilewise-postgres-"))  # short: a socket's path may have 107 characters
    server = Server(binaries, folder)
    try:
        yield server
    finally:
        with contextlib.suppress(AssertionError):  # a test may have left it stopped
            server.stop("immediate")
        shutil.rmtree(folder)
