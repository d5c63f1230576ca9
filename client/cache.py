"""The last good download of each remote source, on disk, for the start at which the source is down."""

import contextlib
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tilewise.domain.errors import SnapshotError
from tilewise.domain.snapshot import Snapshot

log = logging.getLogger("tilewise")


class DiskCache:
    """One snapshot file in `folder` for each key. It never raises: a cache that fails is a cache that is empty."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, *key: str) -> Path:
        name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
        return self.folder / f"{name}.snapshot.json"

    def load(self, *key: str) -> Snapshot | None:
        """Return what was stored under `key`; None where nothing was, or where it is damaged."""
        path = self.path(*key)
        try:
            return Snapshot.loads(path.read_bytes(), name=f"cached snapshot {path}")
        except FileNotFoundError:
            return None
        except (OSError, SnapshotError) as error:
            log.info("the cached answers are not used: %s", error)
            return None

    def age(self, *key: str) -> float:
        """Return the seconds since something was stored under `key`; infinite where nothing was, or in the future."""
        try:
            age = time.time() - self.path(*key).stat().st_mtime
        except OSError:
            return float("inf")
        return age if age >= 0 else float("inf")

    @contextlib.contextmanager
    def turn(self, *key: str, timeout: float) -> Iterator[None]:
        """Let the processes of this machine go one by one, for at most `timeout` seconds: the first fetches, the
        others find what it stored. A lock that cannot be had is done without; the system frees those of the dead."""
        try:
            import fcntl

            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path(*key).with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except (OSError, ImportError):
            yield
            return
        try:
            end = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        break
                    time.sleep(0.01)
                except OSError:  # a file system without locks
                    break
            yield
        finally:
            os.close(handle)

    def store(self, snapshot: Snapshot, *key: str) -> None:
        """Put `snapshot` under `key`, whole or not at all: readers see the old file or the new one."""
        path, data = self.path(*key), snapshot.dumps()
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", suffix=".part", delete=False) as file:
                temporary = file.name
                file.write(data)
            os.replace(temporary, path)
        except OSError as error:
            log.info("the answers were not cached in %s: %s", path, error)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)
