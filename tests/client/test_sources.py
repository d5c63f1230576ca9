"""Sources on this machine: snapshot files and databases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilewise.client.sources import SnapshotFile, open_source
from tilewise.domain.errors import SnapshotError, SourceError
from tilewise.domain.snapshot import Snapshot

from ..domain.examples import DEVICE


def test_a_snapshot_file(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "answers.json"
    path.write_bytes(snapshot.dumps())
    assert open_source(str(path)).fetch(DEVICE, timeout=1) == snapshot


def test_a_missing_file_is_an_error_only_where_it_was_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.json"
    assert SnapshotFile(path, required=False).fetch(DEVICE, timeout=1) == Snapshot(())
    with pytest.raises(SourceError, match="does not exist; correct the path"):
        SnapshotFile(path).fetch(DEVICE, timeout=1)
    with pytest.raises(SourceError, match="cannot be read"):
        SnapshotFile(tmp_path).fetch(DEVICE, timeout=1)


def test_a_damaged_file(tmp_path: Path, snapshot: Snapshot) -> None:
    path = tmp_path / "answers.json"
    path.write_bytes(snapshot.dumps()[:-100])
    for required in (True, False):
        with pytest.raises(SnapshotError, match=r"answers\.json is not a tilewise snapshot"):
            SnapshotFile(path, required=required).fetch(DEVICE, timeout=1)


def test_a_missing_database_is_not_created(tmp_path: Path) -> None:
    path = tmp_path / "tilewise.db"
    with pytest.raises(SourceError, match="does not exist; correct the path, or tune here first"):
        open_source(f"sqlite:///{path}").fetch(DEVICE, timeout=1)
    assert not path.exists()


WITHOUT_SQLALCHEMY = """
import sys
sys.modules["sqlalchemy"] = None
from tilewise.client.sources import open_source
from tilewise.domain.errors import SourceError
try:
    open_source(sys.argv[1]).fetch("a.b", timeout=1)
except SourceError as error:
    print(error)
"""


@pytest.mark.parametrize("url", ["sqlite:///{}/tilewise.db", "postgresql://me:hidden@127.0.0.1:1/tiles"])
def test_without_sqlalchemy_the_error_names_the_extra(url: str, tmp_path: Path) -> None:
    (tmp_path / "tilewise.db").touch()
    # in a process of its own: to import modules anew here would leave two of each behind
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SQLALCHEMY, url.format(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "run `pip install tilewise[server]`" in done.stdout
    assert "hidden" not in done.stdout
