"""The schema in real files: made, brought up to date, refused, and on disks that are full or read-only."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import NamedTuple

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import select, text

from db import migrate, tables
from db.engine import Database, open_database
from farm.errors import StorageError, UsageError
from farm.settings import Settings, make_home
from tests.contract.conftest import Fleet, samples_of


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", data=None, broker_url="", database_url="")


def url_of(settings: Settings) -> str:
    return f"sqlite:///{settings.home / 'farm.db'}"


def made(settings: Settings) -> None:
    """A farm's database as `open_database` makes it, closed again."""
    open_database(settings).close()


def migrated(settings: Settings) -> None:
    """A database made by the migrations alone."""
    migrate.upgrade(settings)


def stamp(settings: Settings, revision: str) -> None:
    """Let a database say that it has another schema."""
    with closing(Database(url_of(settings))) as database, database.write() as conn:
        conn.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})


def dump(settings: Settings) -> list[str]:
    """All of a database as SQL."""
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        driver = conn.connection.driver_connection
        assert driver is not None
        return list(driver.iterdump())


class Ddl(NamedTuple):
    """A statement that made a table or an index, but for the order of its constraints."""

    before: str
    columns: list[str]
    constraints: set[str]
    after: str  #: how the rows are kept


def ddl(settings: Settings) -> dict[str, Ddl]:
    """How a database was made, by the names of its tables and indices."""
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        rows = conn.execute(text("SELECT name, sql FROM sqlite_master WHERE sql NOTNULL AND name != 'alembic_version'"))
        return {name: _ddl(sql) for name, sql in rows}


def _ddl(sql: str) -> Ddl:
    before, rest = sql.split("(", 1)
    body, after = rest.rsplit(")", 1)
    parts = [" ".join(part.split()) for part in re.split(r",(?![^()]*\))", body)]
    constraints = {part for part in parts if part.startswith("CONSTRAINT")}
    return Ddl(before.strip(), [part for part in parts if part not in constraints], constraints, after.strip())


def revision_of(settings: Settings) -> str:
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        return str(conn.scalar(text("SELECT version_num FROM alembic_version")))


# -- the schema --------------------------------------------------------------------------------------------------


def test_the_tables_name_alembics_newest_revision() -> None:
    head = ScriptDirectory.from_config(migrate.alembic_config(None)).get_current_head()

    assert head == tables.SCHEMA_REVISION


@pytest.mark.parametrize("make", [made, migrated])
def test_a_new_database_has_the_newest_schema(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    assert revision_of(settings) == tables.SCHEMA_REVISION


@pytest.mark.parametrize("make", [made, migrated])
def test_a_new_database_is_what_the_tables_say(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    with closing(Database(url_of(settings))) as database, database.read() as conn:
        assert compare_metadata(MigrationContext.configure(conn, opts={"compare_type": True}), tables.metadata) == []


def test_the_migrations_make_the_same_database_as_the_tables(settings: Settings, tmp_path: Path) -> None:
    other = settings.model_copy(update={"home": tmp_path / "other"})
    made(settings)
    migrated(other)

    assert ddl(settings) == ddl(other)


@pytest.mark.parametrize("make", [made, migrated])
def test_results_lie_in_their_key_without_rowid(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    assert {name for name, made_by in ddl(settings).items() if made_by.after == "WITHOUT ROWID"} == {"result"}


@pytest.mark.parametrize("make", [made, migrated])
def test_job_and_attempt_numbers_are_never_given_twice(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    ids = {name: made_by.columns[0] for name, made_by in ddl(settings).items()}
    assert {name for name, column in ids.items() if column.endswith("AUTOINCREMENT")} == {"job", "attempt"}


@pytest.mark.parametrize("make", [made, migrated])
def test_doing_it_again_changes_nothing(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)
    with closing(open_database(settings)) as database:
        Fleet(database).job()
    before = dump(settings)

    make(settings)

    assert dump(settings) == before


def test_an_upgrade_says_which_schema_there_is_now(settings: Settings) -> None:
    assert migrate.upgrade(settings) == f"{settings.home / 'farm.db'} has schema {tables.SCHEMA_REVISION}"


# -- another schema ----------------------------------------------------------------------------------------------


def test_a_database_of_a_newer_schema_is_refused(settings: Settings) -> None:
    made(settings)
    stamp(settings, "9999")

    with pytest.raises(StorageError, match=r"has schema 9999, newer than this farm's \d+: upgrade the farm"):
        made(settings)


def test_a_database_of_a_newer_schema_is_not_changed(settings: Settings) -> None:
    made(settings)
    stamp(settings, "9999")
    before = dump(settings)

    with pytest.raises(StorageError):
        made(settings)

    assert dump(settings) == before


def test_a_database_of_an_older_schema_points_to_the_upgrade(settings: Settings) -> None:
    made(settings)
    stamp(settings, "0000")

    with pytest.raises(StorageError, match=r"has schema 0000, this farm needs \d+: run farm db upgrade"):
        made(settings)


def test_a_database_of_an_older_schema_is_not_changed_unasked(settings: Settings) -> None:
    made(settings)
    stamp(settings, "0000")
    before = dump(settings)

    with pytest.raises(StorageError):
        made(settings)

    assert dump(settings) == before


# -- no database -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["nonsense", "://", "klingon://host/farm", "postgresql+klingon://host/farm", "mssql+pymssql://host/farm"]
)
def test_a_url_that_names_no_database_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="FARM_DATABASE_URL is no database this farm can open"):
        Database(url)


def test_a_file_that_is_no_database_is_a_storage_error_by_name(settings: Settings) -> None:
    settings.home.mkdir()
    (settings.home / "farm.db").write_bytes(b"not a database at all" * 100)

    with pytest.raises(StorageError, match=r"cannot use the database .*farm\.db: file is not a database"):
        open_database(settings)


def test_a_directory_that_is_not_there_is_a_storage_error_by_name(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/nowhere/farm.db")

    with pytest.raises(StorageError, match=r"cannot use the database .*nowhere/farm\.db: unable to open"):
        database.ensure_schema()


def test_a_databases_name_hides_its_password() -> None:
    assert str(Database("postgresql+psycopg://farm:secret@host/farm")) == "postgresql+psycopg://farm:***@host/farm"


# -- disks that refuse -------------------------------------------------------------------------------------------


@pytest.fixture
def disk(settings: Settings) -> Iterator[Path]:
    """The farm's home on a disk of its own, of 1 MiB."""
    settings.home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", settings.home], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a disk needs root's rights: {mounted.stderr.strip()}")
    yield settings.home
    subprocess.run(["umount", "--lazy", settings.home], check=True)


def make_read_only(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)


def fill(disk: Path) -> None:
    """Leave no room for one more page."""
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError:
            pass


def test_a_read_only_home_is_a_storage_error_that_says_what_to_set(settings: Settings, disk: Path) -> None:
    make_read_only(disk)

    with pytest.raises(StorageError, match=f"cannot write in {disk}: Read-only file system. Set FARM_HOME"):
        open_database(settings)


def test_a_database_on_a_read_only_disk_is_a_storage_error_by_name(settings: Settings, disk: Path) -> None:
    made(settings)
    make_read_only(disk)

    with closing(Database(url_of(settings))) as database, pytest.raises(StorageError, match="cannot use the database"):
        Fleet(database).worker()


def test_a_home_on_a_full_disk_is_a_storage_error(settings: Settings, disk: Path) -> None:
    fill(disk)

    with pytest.raises(StorageError, match=r"cannot (write in|use the database) .*home"):
        open_database(settings)


def test_a_disk_that_is_full_is_a_storage_error_by_name(settings: Settings, disk: Path) -> None:
    with closing(open_database(settings)) as database:
        fleet = Fleet(database)
        fleet.job(samples=512, bs=512)
        worker = fleet.worker()
        assignment = worker.take()
        fill(disk)

        with pytest.raises(StorageError, match=r"cannot use the database .*farm\.db: database or disk is full"):
            worker.complete(assignment)


def test_a_commit_that_the_disk_refused_left_nothing_and_can_be_done_again(settings: Settings, disk: Path) -> None:
    with closing(open_database(settings)) as database:
        fleet = Fleet(database)
        job = fleet.job(samples=512, bs=512)
        worker = fleet.worker()
        assignment = worker.take()
        before = fleet.everything()
        fill(disk)
        with pytest.raises(StorageError):
            worker.complete(assignment)
        (disk / "filler").unlink()

        assert fleet.everything() == before
        assert worker.complete(assignment) == []
        assert len(fleet.rows(job)) == len(samples_of(assignment)) == 512


def test_what_was_committed_is_there_after_the_disk_was_full(settings: Settings, disk: Path) -> None:
    with closing(open_database(settings)) as database:
        job = Fleet(database).job()
        fill(disk)

    with closing(Database(url_of(settings))) as database, database.read() as conn:
        assert conn.scalar(select(tables.job.c.id)) == job.id


def test_many_at_once_make_one_home(settings: Settings) -> None:
    at_once(lambda: make_home(settings))


def test_many_at_once_make_one_database(settings: Settings) -> None:
    at_once(lambda: open_database(settings).close())


def test_upgrading_a_database_of_a_newer_schema_is_refused(settings: Settings) -> None:
    made(settings)
    stamp(settings, "9999")

    with pytest.raises(StorageError, match="newer than this farm"):
        migrate.upgrade(settings)


def at_once(call: Callable[[], object], times: int = 6) -> None:
    together = Barrier(times)

    def run() -> None:
        together.wait()
        call()

    with ThreadPoolExecutor(times) as pool:
        for future in [pool.submit(run) for _ in range(times)]:
            future.result()


@pytest.mark.parametrize("refuse", [make_read_only, fill])
def test_a_disk_that_refuses_is_not_waited_for(
    settings: Settings, disk: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[[Path], None]
) -> None:
    if refuse is make_read_only:
        made(settings)
    refuse(disk)

    def waited(_: float) -> None:
        raise AssertionError("waited for a disk that will not change its mind")

    monkeypatch.setattr("db.engine.time.sleep", waited)
    with closing(Database(url_of(settings))) as database, pytest.raises(StorageError):
        start_a_worker(database)


def start_a_worker(database: Database) -> None:
    database.ensure_schema()
    Fleet(database).worker()
