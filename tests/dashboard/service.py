"""A service in a process of its own, which a test may stop and start again at the same address."""

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class Site:
    """`tilewise serve` over one SQLite database; `url` is where it listens, the same after every start."""

    def __init__(self, database: Path, *options: str) -> None:
        self.database = database
        self._options = options
        self._port = "0"
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.database}"

    def start(self) -> None:
        """Start, and return when it listens."""
        command = [sys.executable, "-m", "tilewise.cli.main", "serve", "--port", self._port, "--db", self.database_url]
        self._process = subprocess.Popen(
            [*command, *self._options],
            env={"PYTHONPATH": str(ROOT / "src"), "TILEWISE_HOME": str(self.database.parent), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.url = next((word for word in line.split() if word.startswith("http://")), "").rstrip("/")
        assert self.url, f"the service did not start: {line}{self.stop()}"
        self._port = self.url.rpartition(":")[2]

    def stop(self) -> str:
        """End it as an operator would, and return what it wrote to stderr."""
        assert self._process is not None
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            return process.communicate(timeout=20)[1]
        finally:
            process.kill()

    def close(self) -> None:
        """End it at once: a stream that a page still reads is not waited for."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
