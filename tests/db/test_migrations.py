"""The migrations build exactly what the models say, forth and back."""

from alembic import command
from sqlalchemy import create_engine, inspect, select
from tests.domain.examples import DEVICE, PROBLEM, SOFTWARE, TILED, answer

from tilewise.db import address, schema
from tilewise.db.answer_lists import kernels_of
from tilewise.db.answers import AnswerRepository
from tilewise.db.jobs import JobRepository
from tilewise.db.models import AnswerRow, Base
from tilewise.db.session import Database
from tilewise.db.trials import TrialRepository
from tilewise.domain.job import BUDGETS, JobState
from tilewise.domain.trial import Outcome, Stage, Trial


def test_the_migrations_build_what_the_models_say(database: Database, database_url: str) -> None:
    database.check()
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        # raises and names the difference where there is one; types, names and indexes included
        command.check(schema.config(connection))
    engine.dispose()


def test_down_and_up_again_leaves_the_same_tables(database: Database, database_url: str) -> None:
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        command.downgrade(schema.config(connection), "base")
    assert inspect(engine).get_table_names() == [schema.VERSION_TABLE]
    with engine.begin() as connection:
        command.upgrade(schema.config(connection), "head")
    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, schema.VERSION_TABLE}
    engine.dispose()
    database.check()


def test_what_the_first_schema_kept_is_kept(database: Database, database_url: str) -> None:
    """A database of 0001 with a job, a trial and an answer comes up to this schema with all of them."""
    with database.write() as session:
        AnswerRepository(session).replace(answer(), expected_version=0, reason="first")
        job = JobRepository(session).create(PROBLEM, DEVICE, BUDGETS["quick"])
        assert JobRepository(session).start(job.id) == 1
        trial = Trial(candidate=TILED, stage=Stage.FORWARD, outcome=Outcome.OK, job=job.id)
        TrialRepository(session).add(trial, problem=PROBLEM, device_key=DEVICE, software=SOFTWARE)
    engine = create_engine(address.parse(database_url))
    with engine.begin() as connection:
        command.downgrade(schema.config(connection), "0001")
    assert "tokens" not in inspect(engine).get_table_names()
    engine.dispose()
    database.close()
    with Database.open(database_url, upgrade=True) as upgraded, upgraded.read() as session:
        assert AnswerRepository(session).get(DEVICE, PROBLEM) == answer()
        assert session.scalars(select(AnswerRow.kernels)).all() == [kernels_of(answer().plan)]
        assert TrialRepository(session).list(PROBLEM, DEVICE) == (trial,)
        record = JobRepository(session).get(job.id)
    assert record is not None
    assert (record.job.state, record.attempt, record.job.lease) == (JobState.RUNNING, 1, None)
