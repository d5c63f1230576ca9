"""The page of problems with 10,000 answers: quick and small enough for a first view."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from tilewise.api.app import create_app
from tilewise.bench import dashboard
from tilewise.db.session import Database

LIMIT_MS = 300
LIMIT_BYTES = 200_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("many")
    with Database.open(f"sqlite:///{folder}/tilewise.db", upgrade=True) as database:
        dashboard.fill(database, answers=10_000, trials=10)
        with TestClient(create_app(database)) as made:
            yield made


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/problems",
        "/problems?sort=-tflops&page=150",
        "/problems?q=d128+bf16&mask=causal&match=exact",
        "/problems?match=stale",
    ],
)
def test_a_view_is_quick_and_small(client: TestClient, path: str) -> None:
    views = [dashboard.view(client, path, repeats=1) for _ in range(4)]
    assert min(each.median_ms for each in views) < LIMIT_MS
    assert views[0].bytes + dashboard.own_files() < LIMIT_BYTES
