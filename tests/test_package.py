"""What is installed: a wheel with all it needs, and an `import tilewise` that costs nothing."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMPORT_LIMIT_MS = 150
MEASURE = """
import sys, time
start = time.perf_counter()
import tilewise
spent = (time.perf_counter() - start) * 1e3
heavy = {"torch", "triton", "httpx", "sqlalchemy", "optuna"} & set(sys.modules)
assert not heavy, heavy
print(spent)
"""


def python(*arguments: str, path: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_cheap_and_brings_no_torch(tmp_path: Path) -> None:
    spent = min(float(python("-c", MEASURE, path=ROOT / "src", cwd=tmp_path)) for _ in range(3))
    assert spent < IMPORT_LIMIT_MS


def test_every_public_name_loads(tmp_path: Path) -> None:
    code = "import tilewise; print([getattr(tilewise, name).__name__ for name in tilewise.__all__])"
    assert "attention" in python("-c", code, path=ROOT / "src", cwd=tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tracked files, so that nothing left over in the working tree can help it."""
    folder = tmp_path_factory.mktemp("source")
    # a fresh clone's files, links included, whether or not they are committed yet
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    archive = subprocess.run(
        ["tar", "-c", "--null", "-T", "-"], input=names, cwd=ROOT, capture_output=True, check=True
    ).stdout
    subprocess.run(["tar", "-x"], input=archive, cwd=folder, check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder / "dist"), str(folder)], check=True, capture_output=True)
    (found,) = (folder / "dist").glob("tilewise-*.whl")
    return found


def test_the_wheel_holds_everything_and_only_tilewise(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"tilewise"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    folders = tuple(f"{path.name}/" for path in (ROOT / "src" / "tilewise").iterdir() if path.is_symlink())
    measured = ("bench/results/", "bench/landscapes/")  # stay in the repository
    wanted = {f"tilewise/{name}" for name in tracked if name.startswith(folders) and not name.startswith(measured)}
    assert wanted - names == set()


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    url = f"sqlite:///{tmp_path / 'tilewise.db'}"
    done = python("-m", "tilewise.cli.main", "db", "upgrade", "--db", url, path=tmp_path / "site", cwd=tmp_path)
    assert done == f"{url} is up to date\n"
