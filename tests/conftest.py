"""What holds for every test, and the servers that tests share."""

import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import count

import pytest

from db.engine import Database
from tests.servers import Postgres

# Started in the background of a script, a process ignores Ctrl-C, and hands that down to all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

_numbers = count()

#: Every row goes, numbers begin again; thirty times quicker than a new database.
_EMPTY = """
DO $$
DECLARE one record;
BEGIN
    SET LOCAL session_replication_role = replica;  -- no foreign keys
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid != pg_backend_pid();
    FOR one IN SELECT relname, relkind FROM pg_class WHERE relnamespace = 'public'::regnamespace LOOP
        IF one.relkind = 'S' THEN
            EXECUTE format('ALTER SEQUENCE %I RESTART', one.relname);
        ELSIF one.relkind = 'r' AND one.relname != 'alembic_version' THEN
            EXECUTE format('DELETE FROM %I', one.relname);
        END IF;
    END LOOP;
END $$
"""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server a test process. It is shared: who wants to break one starts its own."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def _made_once(postgres: Postgres) -> str:
    url = postgres.create_database("farm")
    with closing(Database(url)) as database:
        database.ensure_schema()
    return url


@pytest.fixture
def postgres_url(postgres: Postgres, _made_once: str) -> str:
    """A database with the newest schema, which a test must not change, and no rows."""
    postgres.execute(_EMPTY, "farm")
    return _made_once


@pytest.fixture
def bare_postgres_url(postgres: Postgres) -> Iterator[str]:
    """A database of the test's own, without a table."""
    yield from _bare(postgres)


@pytest.fixture
def second_bare_postgres_url(postgres: Postgres) -> Iterator[str]:
    """And another one."""
    yield from _bare(postgres)


def _bare(postgres: Postgres) -> Iterator[str]:
    name = f"bare_{next(_numbers)}"
    yield postgres.create_database(name)
    postgres.drop_database(name)
