"""The service over an empty SQLite database."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from tilewise.api.app import create_app
from tilewise.db.session import Database


@pytest.fixture
def client(sqlite: Database) -> Iterator[TestClient]:
    with TestClient(create_app(sqlite)) as made:
        yield made
