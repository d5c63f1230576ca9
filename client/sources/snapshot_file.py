"""Answers in a snapshot file on this machine."""

from pathlib import Path

from tilewise.domain.errors import SourceError
from tilewise.domain.snapshot import Snapshot


class SnapshotFile:
    """A snapshot file. `required=False`, for the embedded one: a missing file holds no answers, and is no error."""

    local = True

    def __init__(self, path: Path, *, required: bool = True) -> None:
        self.path, self.required = path, required
        self.name = f"snapshot file {path}"

    def fetch(self, device_key: str, *, timeout: float) -> Snapshot:  # noqa: ARG002 - a file holds all devices
        try:
            data = self.path.read_bytes()
        except FileNotFoundError as error:
            if not self.required:
                return Snapshot(())
            raise SourceError(
                f"{self.name} does not exist; correct the path, or write it with `tilewise snapshot export`"
            ) from error
        except OSError as error:
            raise SourceError(
                f"{self.name} cannot be read ({error.strerror}); correct the path or its rights"
            ) from error
        return Snapshot.loads(data, name=self.name)
