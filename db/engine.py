"""
One door to the database: who reads, who writes, what time it is, which schema this is.

Write transactions hold the writers' lock from their first statement (``BEGIN IMMEDIATE`` on SQLite), so a verb in
`db` reads and writes without a second thought. Nothing computes inside one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, create_engine, event, func, inspect, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.engine.url import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from db.tables import SCHEMA_REVISION, metadata
from farm.errors import InvariantBroken, StorageError, UsageError
from farm.settings import Settings, make_home

#: A writer waits so long for the others: well below any sensible lease, lest waiting looks like death.
BUSY_TIMEOUT_S = 10


class Database:
    """A connection pool. `read` and `write` give a transaction each; threads may share one Database."""

    def __init__(self, url: str | URL, *, clock_offset_s: float = 0.0) -> None:
        try:
            self.url = make_url(url) if isinstance(url, str) else url
            self.engine = create_engine(self.url)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as exc:
            raise UsageError(f"FARM_DATABASE_URL is no database this farm can open: {exc}") from exc
        self.is_sqlite = self.engine.dialect.name == "sqlite"
        self.clock_offset_s = clock_offset_s
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    def __str__(self) -> str:
        return self.url.database or "" if self.is_sqlite else self.url.render_as_string(hide_password=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A snapshot; sees no half transaction and blocks no writer."""
        with self._errors(), self.engine.connect() as plain:
            conn = plain if self.is_sqlite else plain.execution_options(isolation_level="REPEATABLE READ")
            with conn.begin():
                yield conn

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """One transaction: all of it or nothing. Keep it short; other writers wait."""
        with self._errors(), self.engine.connect() as plain:
            conn = plain.execution_options(farm_write=True)
            with conn.begin():
                yield conn

    def now(self, conn: Connection) -> float:
        """The one clock, in seconds since the epoch: the server's where there is one, else this host's."""
        if self.is_sqlite:
            return time.time() + self.clock_offset_s
        return float(conn.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0) + self.clock_offset_s

    def ensure_schema(self) -> None:
        """Make the tables in an empty database; refuse one of another schema with what to do."""
        with self.read() as conn:
            revision = _revision(conn)
        if revision is None:
            with self.write() as conn:
                if _revision(conn) is None:
                    metadata.create_all(conn)
                    conn.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
                    conn.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": SCHEMA_REVISION})
                revision = _revision(conn)
        self._refuse_newer(revision)
        if revision != SCHEMA_REVISION:
            raise StorageError(f"{self} has schema {revision}, this farm needs {SCHEMA_REVISION}: run farm db upgrade")

    def refuse_newer(self) -> None:
        """`StorageError` for a database that a newer farm made."""
        with self.read() as conn:
            self._refuse_newer(_revision(conn))

    def _refuse_newer(self, revision: str | None) -> None:
        if revision is not None and revision > SCHEMA_REVISION:
            raise StorageError(
                f"{self} has schema {revision}, newer than this farm's {SCHEMA_REVISION}: upgrade the farm "
                "(nothing was changed)"
            )

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """The driver's errors become ours here and nowhere else."""
        try:
            yield
        except IntegrityError as exc:
            raise InvariantBroken(f"{self} refused a row that must not exist: {exc.orig}") from exc
        except DBAPIError as exc:
            raise StorageError(f"cannot use the database {self}: {exc.orig}") from exc
        except SQLAlchemyError as exc:
            raise StorageError(f"cannot use the database {self}: {exc}") from exc


def open_database(settings: Settings) -> Database:
    """The farm's database, its tables made when it is new."""
    database = connect(settings)
    database.ensure_schema()
    return database


def connect(settings: Settings) -> Database:
    """The farm's database, whatever its schema."""
    if settings.database_url:
        return Database(settings.database_url)
    make_home(settings)
    path = settings.home / "farm.db"
    if not path.exists():
        path.touch(mode=0o600)  # for its owner alone, whatever the umask; SQLite's other files follow it
    return Database(URL.create("sqlite", database=str(path)))


def _revision(conn: Connection) -> str | None:
    if not inspect(conn).has_table("alembic_version"):
        return None
    revision: str | None = conn.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _prepare_sqlite(dbapi: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    dbapi.isolation_level = None  # sqlite3 must not begin by itself
    cursor = dbapi.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    _have_wal(cursor)
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _have_wal(cursor: DBAPICursor) -> None:
    """Changing to WAL, once in a database's life, does not wait for others by itself."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode")
            if cursor.fetchone() != ("wal",):
                cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _begin_sqlite(conn: Connection) -> None:
    write = conn.get_execution_options().get("farm_write", False)
    # A deferred transaction that reads first and writes later fails at once when another wrote in between.
    conn.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
