"""The schema in real files and on a real server: made, brought up to date, refused, and on disks that refuse."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, MetaData, select, text

from db import migrate, tables
from db.engine import Database, open_database
from farm.errors import StorageError, UsageError
from farm.leash import ROOT
from farm.settings import Settings, make_home
from tests.contract.conftest import Fleet, samples_of

#: All the schemas there ever were, oldest first.
REVISIONS = sorted(
    script.revision for script in ScriptDirectory.from_config(migrate.alembic_config(None)).walk_revisions()
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A farm whose database is a file."""
    return Settings(home=tmp_path / "home", data=None, broker_url="", database_url="")


@pytest.fixture(params=["sqlite", "postgres"])
def farm(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    """A farm that has no database yet, on each store."""
    return _on(request.param, request, settings, "bare_postgres_url")


@pytest.fixture
def twin(request: pytest.FixtureRequest, farm: Settings, tmp_path: Path) -> Settings:
    """Another farm without a database, on the same store."""
    other = farm.model_copy(update={"home": tmp_path / "twin"})
    return _on("postgres" if farm.database_url else "sqlite", request, other, "second_bare_postgres_url")


def _on(store: str, request: pytest.FixtureRequest, settings: Settings, fixture: str) -> Settings:
    url = request.getfixturevalue(fixture) if store == "postgres" else ""
    return settings.model_copy(update={"database_url": url})


def url_of(settings: Settings) -> str:
    return settings.database_url or f"sqlite:///{settings.home / 'farm.db'}"


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


Rows = dict[str, list[dict[str, Any]]]


def dump(settings: Settings) -> tuple[Schema, Rows]:
    """All of a database."""
    return schema(settings), rows(settings)


def rows(settings: Settings) -> Rows:
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        found = MetaData()
        found.reflect(conn)
        return {
            name: sorted((dict(row) for row in conn.execute(select(table)).mappings()), key=repr)
            for name, table in found.tables.items()
        }


#: How a database was made: by the names of its tables and indices, what each consists of.
Schema = dict[str, set[str]]


def schema(settings: Settings) -> Schema:
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        if database.is_sqlite:
            made_by = conn.execute(text("SELECT name, sql FROM sqlite_master WHERE sql NOTNULL"))
            found = {name: _parts(sql) for name, sql in made_by}
        else:
            found = {}
            for name, part in conn.execute(text(_POSTGRES_PARTS)):
                found.setdefault(name, set()).add(part)
    del found["alembic_version"]
    return found


def _parts(sql: str) -> set[str]:
    """Of a statement that made a table or an index. The order of columns says nothing, but in an index's key."""
    if not sql.startswith("CREATE TABLE"):
        return {sql}
    before, rest = sql.split("(", 1)
    body, after = rest.rsplit(")", 1)
    parts = [" ".join(part.split()) for part in re.split(r",(?![^()]*\))", body)]
    return {before.replace('"', "").strip(), *parts, after.strip()}


#: Sequences stand in the defaults.
_POSTGRES_PARTS = """
    SELECT c.relname, a.attname || ' ' || format_type(a.atttypid, a.atttypmod)
           || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END || a.attidentity::text
           || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '')
    FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
    UNION ALL SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT conrelid::regclass::text, conname || ' ' || pg_get_constraintdef(oid)
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
"""


def revision_of(settings: Settings) -> str:
    with closing(Database(url_of(settings))) as database, database.read() as conn:
        return str(conn.scalar(text("SELECT version_num FROM alembic_version")))


def of_old(settings: Settings, revision: str) -> None:
    """A database as an older farm left it: its schema, and in every table a row."""
    make_home(settings)
    with closing(Database(url_of(settings))) as database, database.write() as conn:
        command.upgrade(migrate.alembic_config(conn), revision)
        found = MetaData()
        found.reflect(conn)
        for table in found.sorted_tables:
            if table.name != "alembic_version":
                conn.execute(table.insert().values({column.name: _something(column) for column in table.columns}))


def _something(column: Column[Any]) -> object:
    """A value that fits; the same for all columns of a type, hence for a key and what refers to it."""
    kind = column.type.python_type
    return {int: 1, str: "1", float: 1.5, bool: True, bytes: b"\x00\xff"}[kind]


# -- the schema --------------------------------------------------------------------------------------------------


def test_the_tables_name_alembics_newest_revision() -> None:
    head = ScriptDirectory.from_config(migrate.alembic_config(None)).get_current_head()

    assert head == tables.SCHEMA_REVISION == REVISIONS[-1]


@pytest.mark.parametrize("make", [made, migrated])
def test_a_new_database_has_the_newest_schema(farm: Settings, make: Callable[[Settings], None]) -> None:
    make(farm)

    assert revision_of(farm) == tables.SCHEMA_REVISION


@pytest.mark.parametrize("make", [made, migrated])
def test_a_new_database_is_what_the_tables_say(farm: Settings, make: Callable[[Settings], None]) -> None:
    make(farm)

    with closing(Database(url_of(farm))) as database, database.read() as conn:
        assert compare_metadata(MigrationContext.configure(conn, opts={"compare_type": True}), tables.metadata) == []


def test_the_migrations_make_the_same_database_as_the_tables(farm: Settings, twin: Settings) -> None:
    made(farm)
    migrated(twin)

    assert schema(farm) == schema(twin)


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_an_upgrade_makes_the_same_database_as_the_tables(farm: Settings, twin: Settings, revision: str) -> None:
    of_old(farm, revision)
    made(twin)

    migrated(farm)

    assert schema(farm) == schema(twin)


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_an_upgrade_keeps_every_row(farm: Settings, revision: str) -> None:
    of_old(farm, revision)
    before = rows(farm)

    migrated(farm)

    after = rows(farm)
    del before["alembic_version"]
    for table, (row,) in before.items():
        assert [{key: kept[key] for key in row} for kept in after[table]] == [row]


def test_an_upgrade_keeps_which_jobs_were_submitted_together_where_that_was_known(
    farm: Settings, twin: Settings
) -> None:
    of_old(farm, "0003")
    with closing(Database(url_of(farm))) as database, database.write() as conn:
        conn.execute(text("ALTER TABLE job ADD COLUMN submission BIGINT" if farm.database_url else
                          "ALTER TABLE job ADD COLUMN submission INTEGER"))  # fmt: skip
        conn.execute(text("UPDATE job SET submission = 1"))
    made(twin)

    migrated(farm)

    assert schema(farm) == schema(twin)
    assert [row["submission"] for row in rows(farm)["job"]] == [1]


def test_an_upgrade_tells_jobs_the_chips_of_their_artifacts(farm: Settings) -> None:
    of_old(farm, "0003")
    specs = {("acl", "Ascend310P3"): 2, ("ort", "cpu"): 3, ("simulated", "cpu"): 4}
    with closing(Database(url_of(farm))) as database, database.write() as conn:
        columns = "id, state, model, bs, backend, artifact_sha256, samples, spec, created"
        copy = "SELECT :id, state, model, bs, :backend, '', 1, :spec, 0 FROM job WHERE id = 1"
        for (backend, soc), number in specs.items():
            values = {"id": number, "backend": backend, "spec": json.dumps({"artifact": {"soc": soc}})}
            conn.execute(text(f"INSERT INTO job ({columns}) {copy}"), values)

    migrated(farm)

    assert {row["id"]: row["soc"] for row in rows(farm)["job"]} == {1: "", 2: "Ascend310P3", 3: "cpu", 4: ""}


@pytest.mark.parametrize("make", [made, migrated])
def test_results_lie_in_their_key_without_rowid(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    assert {name for name, parts in schema(settings).items() if "WITHOUT ROWID" in parts} == {"result"}


@pytest.mark.parametrize("make", [made, migrated])
def test_job_and_attempt_numbers_are_never_given_twice(settings: Settings, make: Callable[[Settings], None]) -> None:
    make(settings)

    parts = [(name, part) for name, made_by in schema(settings).items() for part in made_by]
    assert {name for name, part in parts if part.endswith("AUTOINCREMENT")} == {"job", "attempt"}


@pytest.mark.parametrize("make", [made, migrated])
def test_doing_it_again_changes_nothing(farm: Settings, make: Callable[[Settings], None]) -> None:
    make(farm)
    with closing(open_database(farm)) as database:
        Fleet(database).job()
    before = dump(farm)

    make(farm)

    assert dump(farm) == before


def test_an_upgrade_says_which_schema_there_is_now(settings: Settings) -> None:
    assert migrate.upgrade(settings) == f"{settings.home / 'farm.db'} has schema {tables.SCHEMA_REVISION}"


# -- another schema ----------------------------------------------------------------------------------------------


def test_a_database_of_a_newer_schema_is_refused(farm: Settings) -> None:
    made(farm)
    stamp(farm, "9999")

    with pytest.raises(StorageError, match=r"has schema 9999, newer than this farm's \d+: upgrade the farm"):
        made(farm)


def test_a_database_of_a_newer_schema_is_not_changed(farm: Settings) -> None:
    made(farm)
    stamp(farm, "9999")
    before = dump(farm)

    with pytest.raises(StorageError):
        made(farm)

    assert dump(farm) == before


def test_a_database_of_an_older_schema_points_to_the_upgrade(farm: Settings) -> None:
    made(farm)
    stamp(farm, "0000")

    with pytest.raises(StorageError, match=r"has schema 0000, this farm needs \d+: run farm db upgrade"):
        made(farm)


def test_a_database_of_an_older_schema_is_not_changed_unasked(farm: Settings) -> None:
    made(farm)
    stamp(farm, "0000")
    before = dump(farm)

    with pytest.raises(StorageError):
        made(farm)

    assert dump(farm) == before


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


def test_many_at_once_make_one_database(farm: Settings) -> None:
    at_once(lambda: open_database(farm).close())


UPGRADE = """
import sys
from db import migrate
from farm.settings import Settings
print(migrate.upgrade(Settings(home=sys.argv[1], database_url=sys.argv[2])))
"""


def test_many_at_once_bring_one_database_up_to_date(farm: Settings) -> None:
    of_old(farm, REVISIONS[0])
    command = [sys.executable, "-c", UPGRADE, str(farm.home), farm.database_url]

    together = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]

    said = [child.communicate()[0].strip() for child in together]
    assert all(each.endswith(f"has schema {tables.SCHEMA_REVISION}") for each in said)


def test_upgrading_a_database_of_a_newer_schema_is_refused(farm: Settings) -> None:
    made(farm)
    stamp(farm, "9999")

    with pytest.raises(StorageError, match="newer than this farm"):
        migrate.upgrade(farm)


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
