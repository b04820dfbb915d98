"""Postgres as farms of many hosts have it: restarted, cut off, raced for, misspelled; and the servers of tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from sqlalchemy import Connection, event, func, insert, select, text

from db import engine, jobs, reopen, results, shards, tables
from db.engine import Database, connect, filesystem_of
from farm.errors import StorageError, UsageError
from farm.jobs import JobState
from farm.leash import ROOT
from farm.settings import Settings
from tests.contract.conftest import LEASE_S, Fleet
from tests.servers import Postgres, Valkey, forget_memory

T = TypeVar("T")
PASSWORD = "sec%ret@1:/?#"
PATIENCE_S = 60.0


@pytest.fixture
def database(postgres_url: str) -> Iterator[Database]:
    with closing(Database(postgres_url)) as database:
        yield database


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database)


@pytest.fixture(scope="module")
def frail() -> Iterator[Postgres]:
    """A server that tests may break, with a password that no URL can hold as it is."""
    with Postgres(password=PASSWORD) as server:
        with closing(Database(server.create_database("farm"))) as database:
            database.ensure_schema()
        yield server


@pytest.fixture
def shaky(frail: Postgres) -> Iterator[Database]:
    """The database on it."""
    with closing(Database(frail.url("farm"))) as database:
        with database.write() as conn:
            conn.execute(tables.event.delete())
        yield database


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def note(conn: Connection, number: int = 0) -> None:
    conn.execute(insert(tables.event).values(at=float(number), kind="note", text=""))


def notes(database: Database) -> list[int]:
    with database.read() as conn:
        return [int(at) for at in conn.execute(select(tables.event.c.at).order_by(tables.event.c.id)).scalars()]


# -- a server that goes away -------------------------------------------------------------------------------------


def kill(server: Postgres) -> None:
    server.kill()
    server.start()


BREAK: dict[str, Callable[[Postgres], None]] = {
    "fast": Postgres.restart,
    "immediate": lambda server: server.restart("immediate"),
    "killed": kill,
}


@pytest.mark.parametrize("how", BREAK)
def test_a_restart_between_transactions_is_not_noticed(frail: Postgres, shaky: Database, how: str) -> None:
    with shaky.write() as conn:
        note(conn, 1)

    BREAK[how](frail)
    with shaky.write() as conn:
        note(conn, 2)

    assert notes(shaky) == [1, 2]


@pytest.mark.parametrize("how", BREAK)
def test_a_restart_within_a_transaction_is_a_storage_error_that_leaves_nothing(
    frail: Postgres, shaky: Database, how: str
) -> None:
    def write() -> None:
        with shaky.write() as conn:
            note(conn, 1)
            BREAK[how](frail)
            note(conn, 2)

    with pytest.raises(StorageError, match="cannot use the database"):
        write()

    assert notes(shaky) == []


@pytest.mark.parametrize("how", BREAK)
def test_a_restart_before_the_commit_is_a_storage_error_that_leaves_nothing(
    frail: Postgres, shaky: Database, how: str
) -> None:
    def write() -> None:
        with shaky.write() as conn:
            note(conn, 1)
            BREAK[how](frail)

    with pytest.raises(StorageError, match="cannot use the database"):
        write()

    assert notes(shaky) == []


def test_a_server_that_restarts_again_and_again_keeps_whole_transactions_and_all_it_acknowledged(
    frail: Postgres, shaky: Database
) -> None:
    enough = threading.Event()
    acknowledged = []

    def write() -> None:
        for number in count():
            if enough.is_set():
                return
            with suppress(StorageError):
                with shaky.write() as conn:
                    note(conn, number)
                    note(conn, number)
                acknowledged.append(number)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            for restart in BREAK.values():
                before = len(acknowledged)
                restart(frail)
                eventually(lambda: len(acknowledged) > before + 10 or writer.done())  # noqa: B023
        finally:
            enough.set()
        writer.result()

    found = notes(shaky)
    assert set(acknowledged) <= set(found)
    assert sorted(found) == sorted([*set(found)] * 2)


def test_a_server_that_is_down_is_a_storage_error_until_it_is_back(frail: Postgres, shaky: Database) -> None:
    frail.stop()
    try:
        with pytest.raises(StorageError, match=r"cannot use the database .*Connection refused"):
            notes(shaky)
    finally:
        frail.start()

    assert notes(shaky) == []


# -- a host that goes away ---------------------------------------------------------------------------------------

LOCK_AND_STOP = """
import os, signal, sys
from sqlalchemy import update
from db import tables
from db.engine import Database
with Database(sys.argv[1], lease_s=2).write() as conn:
    conn.execute(update(tables.device).values(strikes=99))
    os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_what_a_silent_host_has_locked_is_free_before_its_lease_is_over(postgres_url: str, fleet: Fleet) -> None:
    worker = fleet.worker()
    child = subprocess.Popen(
        [sys.executable, "-c", LOCK_AND_STOP, postgres_url], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        eventually(lambda: psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
        with closing(Database(postgres_url, lease_s=2)) as hasty:
            peer = type(worker)(Fleet(hasty), worker.name, worker.incarnation)
            with pytest.raises(StorageError, match="lock timeout"):
                peer.beat()

            eventually(lambda: succeeds(peer.beat))
        os.kill(child.pid, signal.SIGCONT)
        _, said = child.communicate(timeout=PATIENCE_S)
    finally:
        child.kill()
        child.wait()

    assert "StorageError" in said
    assert worker.device.strikes == 0


def succeeds(call: Callable[[], object]) -> bool:
    with suppress(StorageError):
        call()
        return True
    return False


@pytest.mark.parametrize(
    ("lease_s", "lock", "idle"), [(30.0, "10s", "15s"), (300.0, "10s", "15s"), (3.0, "1s", "1500ms")]
)
def test_the_server_ends_waiting_and_silence_within_the_lease(
    postgres_url: str, lease_s: float, lock: str, idle: str
) -> None:
    with closing(Database(postgres_url, lease_s=lease_s)) as database, database.read() as conn:
        assert conn.scalar(text("SHOW lock_timeout")) == lock
        assert conn.scalar(text("SHOW idle_in_transaction_session_timeout")) == idle
        assert conn.scalar(text("SHOW tcp_user_timeout")) == {"15s": "15000", "1500ms": "1500"}[idle]
        assert conn.scalar(text("SHOW tcp_keepalives_idle")) == "10"


@pytest.mark.parametrize("read", [results.rows, results.segments])
def test_who_reads_rows_may_take_longer_over_them_than_a_server_waits_for_who_vanished(
    postgres_url: str, read: Callable[[Connection, int], Iterator[object]]
) -> None:
    with closing(Database(postgres_url, lease_s=0.2)) as database, database.read() as conn:
        list(read(conn, 1))
        time.sleep(0.5)
        assert conn.scalar(select(1)) == 1


def test_a_url_has_the_last_word_on_timeouts(postgres_url: str) -> None:
    with closing(Database(f"{postgres_url}?options=-c%20lock_timeout%3D7s")) as database, database.read() as conn:
        assert conn.scalar(text("SHOW lock_timeout")) == "7s"


# -- time --------------------------------------------------------------------------------------------------------


@pytest.fixture
def a_host_an_hour_ahead(tmp_path: Path, request: pytest.FixtureRequest) -> Settings:
    url = request.getfixturevalue("postgres_url") if request.param == "postgres" else ""
    return Settings(home=tmp_path, data=None, broker_url="", database_url=url, clock_offset_s=3600.0)


@pytest.mark.parametrize(("a_host_an_hour_ahead", "ahead_s"), [("sqlite", 3600), ("postgres", 0)], indirect=[
    "a_host_an_hour_ahead"
])  # fmt: skip
def test_a_hosts_clock_matters_only_where_it_is_the_one_clock(a_host_an_hour_ahead: Settings, ahead_s: float) -> None:
    with closing(connect(a_host_an_hour_ahead)) as database, database.read() as conn:
        assert database.now(conn) - time.time() == pytest.approx(ahead_s, abs=60)


@pytest.mark.parametrize(("a_host_an_hour_ahead", "ahead_s"), [("sqlite", 3600), ("postgres", 0)], indirect=[
    "a_host_an_hour_ahead"
])  # fmt: skip
def test_tests_can_move_the_one_clock_wherever_it_is(a_host_an_hour_ahead: Settings, ahead_s: float) -> None:
    with closing(connect(a_host_an_hour_ahead)) as database, database.read() as conn:
        database.clock_offset_s += 7200
        assert database.now(conn) - time.time() == pytest.approx(7200 + ahead_s, abs=60)


# -- verbs that meet ---------------------------------------------------------------------------------------------


def meanwhile(
    postgres: Postgres, database: Database, first: Callable[[Connection], object], then: Callable[[], T]
) -> T:
    """What `then` answers when it begins before `first` commits: that waits until `then` waits for it, or is done."""

    def waits() -> bool:
        (row,) = postgres.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = 'farm' AND wait_event_type = 'Lock'"
        )
        return row != (0,)

    with ThreadPoolExecutor(1) as pool:
        with database.write() as conn:
            first(conn)
            other = pool.submit(then)
            eventually(lambda: other.done() or waits())
        return other.result()


def test_a_shard_whose_two_attempts_are_handed_back_at_once_is_pending(
    postgres: Postgres, fleet: Fleet, database: Database
) -> None:
    job = fleet.job(samples=1)
    first, second = fleet.worker(0), fleet.worker(1)
    fleet.rival(first.take(), second)

    meanwhile(
        postgres,
        database,
        lambda conn: shards.hand_back(conn, database, first.name, first.incarnation),
        second.hand_back,
    )

    assert fleet.shards(job) == ["pending"]


def test_two_devices_of_a_host_may_find_at_once_that_it_lacks_the_bins(
    postgres: Postgres, fleet: Fleet, database: Database
) -> None:
    job = fleet.job(samples=4)
    first, second = fleet.worker(0), fleet.worker(1)
    mine, other = first.take(), second.take()

    def decline_other() -> None:
        with database.write() as conn:
            shards.decline(conn, database, other, second.name, "no bins", LEASE_S)

    meanwhile(
        postgres,
        database,
        lambda conn: shards.decline(conn, database, mine, first.name, "no bins", LEASE_S),
        decline_other,
    )

    with database.read() as conn:
        assert conn.scalar(select(func.count()).select_from(tables.unfit)) == 1
    assert fleet.state_of(job) is JobState.FAILED


def between(database: Database, statement: int, call: Callable[[], object]) -> Callable[[], None]:
    """Have something happen after so many statements of this thread; the answer ends it."""
    numbers, thread = count(1), threading.get_ident()

    def after(*_: object) -> None:
        if threading.get_ident() == thread and next(numbers) == statement:
            call()

    event.listen(database.engine, "after_cursor_execute", after)
    return lambda: event.remove(database.engine, "after_cursor_execute", after)


@pytest.fixture
def rival(postgres_url: str) -> Iterator[Database]:
    """The same database in other hands, which do not wait long."""
    with closing(Database(postgres_url, lease_s=6)) as database:
        yield database


@pytest.mark.parametrize("statement", range(1, 6))
def test_a_job_whose_last_shard_is_committed_while_it_is_settled_does_not_fail(
    fleet: Fleet, database: Database, rival: Database, statement: int
) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.complete(worker.take())
    last = worker.take()
    late = type(worker)(Fleet(rival), worker.name, worker.incarnation)

    done = between(database, statement, lambda: late.complete(last))
    fleet.settle(job)
    done()
    late.complete(last)  # where settling takes fewer statements than that

    assert fleet.settle(job) is JobState.DONE


@pytest.mark.parametrize("statement", range(1, 6))
def test_a_job_that_is_reopened_while_it_is_settled_is_not_done(
    fleet: Fleet, database: Database, rival: Database, statement: int
) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.finish()

    def distrust() -> None:
        with suppress(StorageError), rival.write() as conn:  # it may have to wait for us, who wait for it
            reopen.distrust(conn, rival, worker.name, 0.0, "tested")

    done = between(database, statement, distrust)
    fleet.settle(job)
    done()

    with database.read() as conn:
        is_open = conn.scalar(select(func.count()).where(tables.shard.c.state == "pending")) == 2
        assert (jobs.state(conn, job.id) is JobState.RUNNING) == is_open


def test_many_that_assign_complete_fail_and_rescue_at_once_neither_block_nor_double(
    fleet: Fleet, database: Database
) -> None:
    job = fleet.job(samples=60)
    workers = [fleet.worker(index) for index in range(4)]
    enough = threading.Event()

    def tick() -> None:
        while not enough.is_set():
            fleet.rescue()
            fleet.assign()
            fleet.settle(job)

    def work(number: int) -> None:
        for turn in count(number):
            if (assignment := workers[number].try_to_take()) is None:
                return
            if turn % 7 == 3:
                workers[number].hand_back()
            else:
                workers[number].complete(assignment)

    with ThreadPoolExecutor(6) as pool:
        ticks = [pool.submit(tick) for _ in range(2)]
        try:
            for done in [pool.submit(work, number) for number in range(4)]:
                done.result()
        finally:
            enough.set()
        for done in ticks:
            done.result()
    for worker in workers:
        worker.finish()

    assert fleet.settle(job) is JobState.DONE
    assert len(fleet.rows(job)) == 60


# -- URLs and what is said of them -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://farm:{PASSWORD}@host/farm",
        "postgresql+psycopg://farm:sec@ret@host/farm",
        "postgresql+psycopg://farm:sec@r/et@host/farm",
        "postgresql+psycopg://farm:secret@host:port/farm",
        "mysql://farm:secret@host/farm",
        "redis://farm:secret@host/0",
        "farm:secret@host",
        "secret",
    ],
)
def test_a_url_that_cannot_be_opened_is_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="FARM_DATABASE_URL is no database this farm can open: expected ") as caught:
        Database(url)

    shown = "".join(traceback.format_exception_only(caught.value))
    assert not any(part in shown for part in ("secret", "sec@", "sec%", "ret@", "et@"))
    assert caught.value.__context__ is None


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgres_may_be_spelled_as_others_do(scheme: str, postgres_url: str) -> None:
    _, rest = postgres_url.split("://")

    with closing(Database(f"{scheme}://{rest}")) as database, database.read() as conn:
        assert conn.scalar(text("SELECT 1")) == 1


def wrong_password(server: Postgres) -> str:
    return server.url("farm").replace("farm:", "farm:also")


def no_such_database(server: Postgres) -> str:
    return server.url("nowhere")


def nobody_listens(server: Postgres) -> str:
    return server.url("farm").replace(f":{server.port}/", ":1/")


def no_such_option(server: Postgres) -> str:
    return f"{server.url('farm')}?nonsense=1&password=secret"


@pytest.mark.parametrize("broken", [wrong_password, no_such_database, nobody_listens, no_such_option])
def test_no_error_shows_the_password(frail: Postgres, broken: Callable[[Postgres], str]) -> None:
    with closing(Database(broken(frail))) as database, pytest.raises(StorageError) as caught:
        database.ensure_schema()

    shown = "".join(traceback.format_exception(caught.value))  # with all that led to it
    assert not any(part in shown for part in (PASSWORD, "sec%", "secret"))
    assert "\n" not in str(caught.value)


# -- SQLite where it must not be ---------------------------------------------------------------------------------

MOUNTINFO = r"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw,relatime shared:2 - nfs4 server:/home rw,vers=4.2
31 30 8:2 / /home/local rw,relatime - xfs /dev/sdb1 rw
32 22 0:41 / /mnt/with\040space rw,relatime - fuse.sshfs me@host:/ rw
33 22 0:42 / /mnt/twice rw - ext4 /dev/sdc1 rw
34 33 0:43 / /mnt/twice rw master:3 propagate_from:2 - cifs //server/share rw
a line of some other kernel
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/farm.db", "ext4"),
        ("/home/me/farm.db", "nfs4"),
        ("/home", "nfs4"),
        ("/homely/farm.db", "ext4"),
        ("/home/local/farm.db", "xfs"),
        ("/mnt/with space/farm.db", "fuse.sshfs"),
        ("/mnt/twice/farm.db", "cifs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    assert filesystem_of(path, MOUNTINFO) == kind


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"1 0 0:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:2 / {tmp_path}/share rw - nfs server:/ rw\n")
    monkeypatch.setattr(engine, "MOUNTS", mounts)
    (tmp_path / "link").symlink_to(tmp_path / "share")

    Database(f"sqlite:///{tmp_path}/farm.db").close()
    for place in ("share", "link"):
        with pytest.raises(UsageError, match=rf"{place}/farm\.db lies on a network file system \(nfs\).*Postgres"):
            Database(f"sqlite:///{tmp_path}/{place}/farm.db")


# -- the servers of tests ----------------------------------------------------------------------------------------

START_AND_TELL = """
import sys, time
from tests.servers import Postgres, Valkey
with Postgres() as postgres, Valkey() as valkey:
    print(postgres.pid, postgres.directory, valkey.pid, valkey.directory, flush=True)
    time.sleep(600)
"""


def test_servers_die_with_the_test_process_whatever_kills_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", START_AND_TELL], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        words = child.stdout.readline().split()
    servers = [psutil.Process(int(pid)) for pid in words[::2]]
    servers += [each for server in servers for each in server.children(recursive=True)]

    child.kill()
    child.wait()
    try:
        eventually(lambda: not any(server.is_running() and server.status() != "zombie" for server in servers))
    finally:
        for directory in words[1::2]:
            assert directory.startswith("/tmp/farm-")
            forget_memory(Path(directory))
            subprocess.run(["rm", "-rf", directory], check=True)


def test_a_broker_keeps_what_it_had_unless_it_is_wiped() -> None:
    with Valkey() as valkey:
        with valkey.admin() as client:
            client.set("farm:kept", 1)
        valkey.restart()
        with valkey.admin() as client:
            assert client.get("farm:kept") == b"1"
        valkey.restart(wiped=True)
        with valkey.admin() as client:
            assert client.get("farm:kept") is None


def test_no_password_is_in_the_process_list_or_left_behind(frail: Postgres) -> None:
    with Valkey(password=PASSWORD) as valkey:
        lines = " ".join(" ".join(psutil.Process(server.pid).cmdline()) for server in (frail, valkey))
        directory = valkey.directory

    assert PASSWORD not in lines
    assert not directory.exists()
