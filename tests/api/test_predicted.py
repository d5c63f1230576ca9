"""Answers for a device that was never measured: the service, the database and a client say the same."""

import dataclasses
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient
from tests.domain.examples import DEVICE, PROBLEM, SDPA, SOFTWARE, answer

from tilewise.api import schemas
from tilewise.client.sources import open_source
from tilewise.client.table import SealedTable
from tilewise.db.answers import AnswerRepository
from tilewise.db.session import Database
from tilewise.domain import codec, transfer
from tilewise.domain.answer import Answer, Match
from tilewise.domain.config import Plan
from tilewise.domain.problem import Problem
from tilewise.domain.snapshot import Snapshot

NEVER = DEVICE.replace("avx512", "avx2")
H200 = "nvidia-h200.sm90.141g.700w"
ASKED = [
    PROBLEM,
    dataclasses.replace(PROBLEM, q_len=2000, kv_len=2000),
    dataclasses.replace(PROBLEM, batch=2),
    dataclasses.replace(PROBLEM, batch=16),
    dataclasses.replace(PROBLEM, head_dim=32),
]


def put(database: Database, *answers: Answer, expected_version: int = 0) -> None:
    with database.write() as session:
        for each in answers:
            assert AnswerRepository(session).replace(each, expected_version=expected_version, reason="test")


def one(client: TestClient | httpx.Client, problem: Problem, device_key: str = NEVER) -> Answer:
    found = client.get(f"/v1/answers/{device_key}/{problem.key}", params={"software": SOFTWARE.key})
    assert schemas.Answer.model_validate_json(found.content)
    return codec.from_json(Answer, found.json())


@pytest.fixture
def filled(sqlite: Database) -> Database:
    """Answers of DEVICE of which one says something elsewhere, and some of a GPU."""
    beaten = dataclasses.replace(answer(dataclasses.replace(PROBLEM, batch=4)), plan=Plan(SDPA))
    put(sqlite, answer(), beaten, answer(device_key=H200), answer(dataclasses.replace(PROBLEM, batch=64)))
    return sqlite


@pytest.mark.usefixtures("filled")
def test_one_answer_comes_with_bounds_evidence_and_the_device_it_is_of(client: TestClient) -> None:
    found = one(client, PROBLEM)
    assert (found.match, found.measured_on, found.plan) == (Match.PREDICTED, DEVICE, answer().plan)
    model = transfer.shipped()["cpu_tiled.cpu_tiled.inference"].predicted
    assert model is not None
    assert found.regret == pytest.approx(model.regret.at(0, 1.0))
    assert found.missed.startswith(f"device: {PROBLEM.key} was not measured on {NEVER}")
    assert found.evidence == answer().evidence
    assert (found.expected_ms, found.interval) == (None, None)
    assert one(client, PROBLEM, H200.replace("700w", "350w")).match is Match.DEFAULT  # of another kind
    counted = client.get("/metrics").text
    assert 'tilewise_lookups_total{match="predicted"} 1.0' in counted


@pytest.mark.usefixtures("filled")
def test_all_ways_to_ask_say_the_same(client: TestClient) -> None:
    alone = [one(client, problem) for problem in ASKED]
    question = {"device": NEVER, "problems": [problem.key for problem in ASKED], "software": SOFTWARE.key}
    together = client.post("/v1/answers", json={**question, "evidence": True}).json()["answers"]
    assert [codec.from_json(Answer, each) for each in together] == alone
    bare = client.post("/v1/answers", json=question).json()["answers"]
    assert [codec.from_json(Answer, each) for each in bare] == [
        dataclasses.replace(each, evidence=None) for each in alone
    ]
    sent = Snapshot.loads(client.get(f"/v1/answers/{NEVER}").content)
    table = SealedTable(sent, NEVER, SOFTWARE, origin="the service")
    assert [table.lookup(problem) for problem in ASKED] == alone
    assert {each.match for each in alone} == {Match.PREDICTED, Match.DEFAULT}
    # no more than what can be of use there
    batches = [(found.device_key, found.problem.batch) for found in sent.answers]
    assert batches == [(DEVICE, 1), (DEVICE, 64)]


def test_the_database_and_the_service_send_the_same_snapshot(client: TestClient, filled: Database) -> None:
    put(filled, answer(dataclasses.replace(PROBLEM, batch=3), device_key=NEVER))
    for device_key in (NEVER, DEVICE, H200, "nobody-knows.this"):
        sent = client.get(f"/v1/answers/{device_key}").content
        assert open_source(f"sqlite:///{filled.file}").fetch(device_key, timeout=5).dumps() == sent
        frozen = client.post("/v1/snapshots", json={"device": device_key}).json()
        assert frozen["id"] == Snapshot.loads(sent).id


def test_a_change_on_the_other_device_is_seen_and_others_stay(client: TestClient, filled: Database) -> None:
    assert one(client, PROBLEM).match is Match.PREDICTED
    body = {"device": H200, "problems": [PROBLEM.key]}
    client.post("/v1/answers", json=body)
    client.post("/v1/answers", json={**body, "device": NEVER})
    before = client.get(f"/v1/answers/{NEVER}").headers["etag"]
    put(filled, dataclasses.replace(answer(), expected_ms=29.5), expected_version=1)
    assert one(client, PROBLEM).match is Match.DEFAULT  # it no longer wins by enough
    assert client.get(f"/v1/answers/{NEVER}").headers["etag"] != before
    kept = {key[0] for key in client.app.state.answer_book._state.pieces}  # type: ignore[attr-defined]
    assert kept == {H200}
    put(filled, answer(device_key=NEVER))
    assert one(client, PROBLEM).match is Match.EXACT


def test_a_snapshot_file_of_several_devices_predicts(tmp_path: Path, filled: Database) -> None:
    """The embedded snapshot holds all devices of a database, and is what a client asks without any setting."""
    with filled.read() as session:
        whole = AnswerRepository(session).snapshot()
    path = tmp_path / "all.json"
    path.write_bytes(whole.dumps())
    table = SealedTable(open_source(str(path)).fetch(NEVER, timeout=5), NEVER, SOFTWARE, origin="a file")
    assert table.lookup(PROBLEM).match is Match.PREDICTED
    assert len(table) == 0
