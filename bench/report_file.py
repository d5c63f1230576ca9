"""Reports as files: JSON that later invocations add to, and the page for readers beside it."""

import json
import os
from pathlib import Path
from typing import TypeVar

from tilewise.domain import codec
from tilewise.domain.errors import SettingsError

Report = TypeVar("Report")


def load(kind: type[Report], path: Path, *, command: str) -> Report:
    """Return the report at `path`. Raises SettingsError where there is none that `command` wrote."""
    try:
        return codec.from_json(kind, json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is no report of `{command}` ({error}); name another file") from error


def check_device(path: Path, found: str, here: str) -> None:
    """Raise SettingsError unless the rows at `path` are of the device that this is, both by their keys."""
    if found != here:
        raise SettingsError(f"{path} holds rows of {found}, and this is {here}; name another file with --output")


def check_target(path: Path) -> None:
    """Raise SettingsError unless a report can be written at `path`, before hours are spent on its rows.

    Page and plots have its name with other endings, so it must be a name of its own.
    """
    if path.suffix != ".json":
        raise SettingsError(f"--output {path}: expected a name that ends in .json; the page and plots go beside it")
    part = _part(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()
    except OSError as error:
        raise SettingsError(f"--output {path} cannot be written ({error}); name another file") from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def save(report: object, page: str, path: Path) -> None:
    """Write the JSON to `path` and `page` beside it, each at once: an interrupted run leaves the last whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.dumps(codec.to_json(report), indent=1) + "\n"
    for target, text in ((path, document), (path.with_suffix(".md"), page)):
        part = _part(target)
        part.write_text(text)
        os.replace(part, target)
