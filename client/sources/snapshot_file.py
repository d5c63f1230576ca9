"""Answers in a snapshot file on this machine."""

from pathlib import Path

from tilewise.domain.errors import SourceError
from tilewise.domain.snapshot import Snapshot
from tilewise.domain.usage import Usage


class SnapshotFile:
    """A snapshot file. `required=False`, for the embedded one: a missing file holds no answers, and is no error."""

    local = True

    def __init__(self, path: Path, *, required: bool = True) -> None:
        self.path, self.required = path, required
        self.name = f"snapshot file {path}"

    def report(self, usage: Usage, *, timeout: float) -> None:
        """A file keeps no usage."""

    def fetch(
        self,
        device_key: str,  # noqa: ARG002 - a file holds all devices
        *,
        timeout: float,  # noqa: ARG002 - the caller keeps the limit
        pin: str | None = None,  # noqa: ARG002 - the caller compares the id
        known: Snapshot | None = None,  # noqa: ARG002 - reading is cheap
    ) -> Snapshot:
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
