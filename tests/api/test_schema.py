"""Requests made from the OpenAPI document: none is answered with a 5xx, an undocumented status or another shape.

`make contract` runs thousands of them; here are few, the same ones every time.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import schemathesis.openapi
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, TILED, answer, measurement

from tilewise.api.app import create_app
from tilewise.api.settings import ServiceSettings
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.session import Database
from tilewise.db.snapshots import ChannelRepository, SnapshotRepository
from tilewise.db.tokens import TokenRepository
from tilewise.db.trials import TrialRepository
from tilewise.domain.job import BUDGETS
from tilewise.domain.token import Scope
from tilewise.domain.trial import Outcome, Stage, Trial

EXAMPLES = int(os.environ.get("TILEWISE_SCHEMA_EXAMPLES", "12"))  # of each operation
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[FastAPI, str]]:
    """A service that has something of everything, and a token that may do everything: requests make tokens, too."""
    folder: Path = tmp_path_factory.mktemp("schema")
    with Database.open(f"sqlite:///{folder / 'tilewise.db'}", upgrade=True) as database:
        with database.write() as session:
            AnswerRepository(session).replace(answer(), expected_version=0, reason="test")
            job = JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"]).id
            frozen = SnapshotRepository(session).freeze(AnswerRepository(session).snapshot())
            ChannelRepository(session).move("stable", frozen.id, reason="test", actor="test")
            trial = Trial(
                candidate=TILED, stage=Stage.FORWARD, outcome=Outcome.OK, measurement=measurement(1.0, 0.5), job=job
            )
            TrialRepository(session).add(trial, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)
            token = TokenRepository(session).create("test", (Scope.ADMIN,))[1]
        yield create_app(database, ServiceSettings(rate=0)), token


def test_every_request_is_answered_as_described(served: tuple[FastAPI, str]) -> None:
    app, token = served
    headers = {"Authorization": f"Bearer {token}"}
    # a stream of events does not end while its job waits: tests/api/test_resources.py reads them
    document = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers).exclude(path_regex="/events$")
    asked: dict[str, int] = {}
    for found in document.get_all_operations():
        assert isinstance(found, Ok), found
        operation = found.ok()
        for mode in GenerationMode:
            ask(operation, mode, asked, headers)
    assert len(asked) >= 20
    assert min(asked.values()) >= 1
    print(f"{sum(asked.values())} requests to {len(asked)} operations")


def ask(
    operation: APIOperation[Any, Any, Any, Any], mode: GenerationMode, asked: dict[str, int], headers: dict[str, str]
) -> None:
    """Send requests of one operation that follow its description, or break it; raises where the answer does."""

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def send(case: schemathesis.Case[Any]) -> None:
        asked[operation.label] = asked.get(operation.label, 0) + 1
        case.call_and_validate(checks=CHECKS, headers=headers)

    try:
        send()
    except Unsatisfiable:  # nothing about an operation without parameters can be broken
        assert mode is GenerationMode.NEGATIVE
