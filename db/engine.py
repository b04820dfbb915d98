"""
One door to the database: who reads, who writes, what time it is, which schema this is.

Write transactions hold the writers' lock from their first statement (``BEGIN IMMEDIATE`` on SQLite), so a verb in
`db` reads and writes without a second thought. Nothing computes inside one.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, create_engine, event, func, inspect, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.engine.url import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.pool import ConnectionPoolEntry

from db.tables import SCHEMA_REVISION, metadata
from farm.errors import InvariantBroken, StorageError, UsageError
from farm.settings import Settings, make_home

#: A writer waits so long for the others: well below any sensible lease, lest waiting looks like death.
BUSY_TIMEOUT_S = 10

#: How both ends of a connection notice that the other is gone: after 25 s of silence.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
#: A worker's threads: the shard and the heartbeat; what more are wanted for a moment are closed again.
_POOL: Mapping[str, Any] = {"pool_size": 2, "max_overflow": 8, "pool_timeout": BUSY_TIMEOUT_S, "pool_pre_ping": True}
#: Of our own among the server's advisory locks.
_SCHEMA_LOCK = 0x6661726D

MOUNTS = Path("/proc/self/mountinfo")
#: Where SQLite's locks or its shared memory do not reach all who may open the file.
_NETWORK_FILESYSTEMS = frozenset(
    (
        *("afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs"),
        *("nfs", "nfs4", "ocfs2", "orangefs", "panfs", "pvfs2", "smb3", "smbfs", "wekafs"),
        *("fuse.ceph", "fuse.ceph-fuse", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.goofys", "fuse.juicefs"),
        *("fuse.mfs", "fuse.moosefs", "fuse.nfs", "fuse.rclone", "fuse.s3fs", "fuse.seaweedfs", "fuse.sshfs"),
    )
)


class Database:
    """
    A connection pool. `read` and `write` give a transaction each; threads may share one Database.

    `host_offset_s` is what this host's clock is off by, and matters where that is the clock; `clock_offset_s` moves the
    one clock wherever it is. What a host that vanished had locked is free again before its lease is over.
    """

    def __init__(
        self, url: str | URL, *, clock_offset_s: float = 0.0, host_offset_s: float = 0.0, lease_s: float = 30.0
    ) -> None:
        self.url = _parse(url) if isinstance(url, str) else url
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            _refuse_network_filesystem(self.url.database)
        try:
            self.engine = create_engine(self.url, **({} if self.is_sqlite else _postgres_options(self.url, lease_s)))
        except ModuleNotFoundError as exc:
            raise UsageError(f"{_NO_DATABASE}: {exc}. Install it with pip install 'psycopg[binary]'") from exc
        self.clock_offset_s = clock_offset_s
        self.host_offset_s = host_offset_s
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    def __str__(self) -> str:
        # Without its query: a password may stand there too.
        return self.url.database or "" if self.is_sqlite else self.url.set(query={}).render_as_string()

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
            return time.time() + self.host_offset_s + self.clock_offset_s
        return float(conn.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0) + self.clock_offset_s

    def ensure_schema(self) -> None:
        """Make the tables in an empty database; refuse one of another schema with what to do."""
        with self.read() as conn:
            revision = _revision(conn)
        if revision is None:
            with self.write() as conn:
                self.hold_schema(conn)
                if _revision(conn) is None:
                    metadata.create_all(conn)
                    conn.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
                    conn.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": SCHEMA_REVISION})
                revision = _revision(conn)
        self._refuse_newer(revision)
        if revision != SCHEMA_REVISION:
            raise StorageError(f"{self} has schema {revision}, this farm needs {SCHEMA_REVISION}: run farm db upgrade")

    def hold_schema(self, conn: Connection) -> None:
        """Have the schema to oneself until the transaction ends, however long that takes."""
        if not self.is_sqlite:
            conn.execute(select(func.pg_advisory_xact_lock(_SCHEMA_LOCK)))
            conn.execute(text("SET LOCAL statement_timeout = 0"))

    def refuse_newer(self) -> None:
        """`StorageError` for a database that a newer farm made."""
        with self.read() as conn:
            revision = _revision(conn)
        self._refuse_newer(revision)

    def _refuse_newer(self, revision: str | None) -> None:
        if revision is not None and revision > SCHEMA_REVISION:
            self.close()
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
            raise InvariantBroken(f"{self} refused a row that must not exist: {_line(exc.orig)}") from exc
        except DBAPIError as exc:
            raise StorageError(f"cannot use the database {self}: {_line(exc.orig)}") from exc
        except SQLAlchemyError as exc:
            raise StorageError(f"cannot use the database {self}: {exc}") from exc


def locks_rows(conn: Connection) -> bool:
    """Whether rows can be locked; SQLite's writers have the whole database to themselves."""
    return conn.dialect.name != "sqlite"


def open_database(settings: Settings) -> Database:
    """The farm's database, its tables made when it is new."""
    database = connect(settings)
    try:
        database.ensure_schema()
    except BaseException:
        database.close()
        raise
    return database


def connect(settings: Settings) -> Database:
    """The farm's database, whatever its schema."""
    if settings.database_url:
        return Database(settings.database_url, host_offset_s=settings.clock_offset_s, lease_s=settings.lease_s)
    make_home(settings)
    path = settings.home / "farm.db"
    if not path.exists():
        path.touch(mode=0o600)  # for its owner alone, whatever the umask; SQLite's other files follow it
    return Database(URL.create("sqlite", database=str(path)), host_offset_s=settings.clock_offset_s)


_NO_DATABASE = "FARM_DATABASE_URL is no database this farm can open"


def _parse(text: str) -> URL:
    """A URL of ours, its driver named; `UsageError` shows no more of another than its scheme, for it has a password."""
    scheme, separator, rest = text.partition("://")
    if scheme in ("postgres", "postgresql"):
        scheme = "postgresql+psycopg"
    # Of two @ the first would end the password, and its rest be shown as the host.
    if separator and (scheme == "sqlite" or (scheme == "postgresql+psycopg" and rest.count("@") < 2)):
        with suppress(ArgumentError, ValueError):
            return make_url(f"{scheme}://{rest}")
    raise UsageError(
        f"{_NO_DATABASE}: expected postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME, special characters of the "
        f"password as %XX, or sqlite:////path/to/farm.db; found {scheme[:30] if separator else 'no'}://..."
    )


def _postgres_options(url: URL, lease_s: float) -> dict[str, Any]:
    """How a connection is made and when it is given up. The URL's query overrides any of it."""
    silent_ms = int(min(15.0, lease_s / 2) * 1000)
    session = {
        "lock_timeout": int(min(BUSY_TIMEOUT_S, lease_s / 3) * 1000),
        "idle_in_transaction_session_timeout": silent_ms,
        "statement_timeout": 60_000,
        "tcp_user_timeout": silent_ms,
        **{f"tcp_{name}": value for name, value in _KEEPALIVE.items()},
    }
    arguments = {
        "connect_timeout": 5,
        "tcp_user_timeout": silent_ms,
        **_KEEPALIVE,
        "application_name": "farm",
        "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
    }
    return {"connect_args": {name: value for name, value in arguments.items() if name not in url.query}, **_POOL}


def _line(error: object) -> str:
    """A driver's message, which may have several lines, in one."""
    return " ".join(str(error).split())


def _refuse_network_filesystem(path: str | None) -> None:
    if not path or path == ":memory:":
        return
    try:
        kind = filesystem_of(os.path.realpath(path), MOUNTS.read_text(errors="surrogateescape"))
    except OSError:
        return  # no such thing here: nothing is known
    if kind in _NETWORK_FILESYSTEMS:
        raise UsageError(
            f"{path} lies on a network file system ({kind}), where SQLite loses data: set FARM_HOME to a directory on "
            "a local disk, or FARM_DATABASE_URL to a Postgres database"
        )


def filesystem_of(path: str, mountinfo: str) -> str:
    """The kind of file system that an absolute path without links lies on, by the text of /proc/self/mountinfo."""
    best, kind = "", ""
    for line in mountinfo.splitlines():
        mount, _, source = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 5 or not source:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        above = path == point or path.startswith(point.rstrip("/") + "/")
        if above and len(point) >= len(best):  # of two at one place, the later hides the earlier
            best, kind = point, source.split(" ")[0]
    return kind


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
