"""The migrations build exactly what the models say, forth and back."""

from alembic import command
from sqlalchemy import create_engine, inspect

from tilewise.db import address, schema
from tilewise.db.models import Base
from tilewise.db.session import Database


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
