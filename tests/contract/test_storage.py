"""
What every store keeps: each verb is one conditional change, whose answer says whether the caller won.

A worker here is one incarnation of a device and the test is its program; an old one is a zombie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import sleep

import pytest
from sqlalchemy import insert, text

from db import devices, jobs, overview, results, shards, tables
from db.engine import Database
from farm.errors import InvariantBroken, StorageError, UsageError
from farm.jobs import Assignment, DeviceState, Failure, Job, JobState, ResultState, SampleResult
from tests.contract.conftest import LEASE_S, Fleet, Worker, failed, name_of, samples_of, scored

BREAKING = [Failure.CRASH, Failure.HANG]


# -- transactions ------------------------------------------------------------------------------------------------


def test_a_transaction_that_breaks_leaves_nothing(fleet: Fleet, database: Database) -> None:
    def break_off() -> None:
        with database.write() as conn:
            conn.execute(insert(tables.event).values(at=1.0, kind="x", text=""))
            raise RuntimeError("broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        break_off()

    assert fleet.events("x") == []


@pytest.mark.parametrize("database", ["sqlite"], indirect=True)  # elsewhere writers lock rows
def test_a_second_writer_waits_from_its_first_statement(database: Database) -> None:
    order = []

    def write() -> None:
        with database.write():
            order.append("second")

    with database.write():
        other = threading.Thread(target=write)
        other.start()
        sleep(0.1)
        order.append("first")
    other.join()

    assert order == ["first", "second"]


def test_a_reader_blocks_no_writer(fleet: Fleet, database: Database) -> None:
    with database.read() as conn:
        devices.everything(conn)

        fleet.worker()

    assert fleet.events("device_up")


def test_a_reader_keeps_its_snapshot_while_others_write(fleet: Fleet, database: Database) -> None:
    with database.read() as conn:
        devices.everything(conn)

        fleet.worker()

        assert devices.everything(conn) == []


def test_a_writer_blocks_no_reader(fleet: Fleet, database: Database) -> None:
    with database.write() as conn:
        conn.execute(insert(tables.event).values(at=1.0, kind="x", text=""))

        assert fleet.events("x") == []


def test_a_row_that_names_nothing_is_an_alarm(database: Database) -> None:
    orphan = {"job_id": 99, "name": "a", "superseded": 0, "attempt_id": 99, "state": "scored", "label": 0}

    with pytest.raises(InvariantBroken, match="refused a row that must not exist"), database.write() as conn:
        conn.execute(insert(tables.result).values(**orphan))


def test_what_the_driver_says_becomes_a_storage_error(database: Database) -> None:
    with pytest.raises(StorageError, match=r"cannot use the database .*nonsense"), database.read() as conn:
        conn.execute(text("SELECT nonsense"))


# -- jobs --------------------------------------------------------------------------------------------------------


def test_a_job_is_read_back_as_it_was_written(fleet: Fleet) -> None:
    job = fleet.job(bs=4, only=("h:1", "h:2"))

    assert fleet.again(job) == job


def test_a_new_job_is_pending(fleet: Fleet) -> None:
    assert fleet.job().state is JobState.PENDING


def test_a_new_jobs_shards_are_pending(fleet: Fleet) -> None:
    job = fleet.job(samples=3)

    assert fleet.shards(job) == ["pending"] * 3


def test_a_job_that_was_never_there_is_a_usage_error(fleet: Fleet, database: Database) -> None:
    with pytest.raises(UsageError, match="there is no job 99: farm jobs lists them"), database.read() as conn:
        jobs.get(conn, 99)


def test_recent_jobs_come_newest_first(fleet: Fleet, database: Database) -> None:
    made = [fleet.job().id for _ in range(3)]

    with database.read() as conn:
        assert [job.id for job in jobs.recent(conn, limit=2)] == [made[2], made[1]]


def test_active_jobs_come_oldest_first_without_the_ended(fleet: Fleet, database: Database) -> None:
    first, second, third = (fleet.job() for _ in range(3))
    fleet.cancel(second)

    with database.read() as conn:
        assert [job.id for job in overview.active(conn, 10)[0]] == [first.id, third.id]


def test_progress_counts_samples_shards_and_attempts(fleet: Fleet, database: Database) -> None:
    job, worker = fleet.job(samples=20, shards=[(0, 4), (4, 8), (8, 12), (12, 16), (16, 20)]), fleet.worker()
    taken = worker.take()
    worker.complete(taken, [failed("s0000"), *samples_of(taken)[1:]])

    with database.read() as conn:
        progress = jobs.progress(conn, job.id)

    found = (
        progress.finished_samples,
        progress.failed_samples,
        progress.shards,
        progress.open_shards,
        progress.live_attempts,
    )
    assert found == (4, 1, 5, 4, 2)


def test_progress_does_not_count_superseded_rows(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    worker.complete(worker.take(), [failed("s0000")])
    fleet.supersede(job)

    with database.read() as conn:
        assert jobs.progress(conn, job.id).failed_samples == 0


# -- assign ------------------------------------------------------------------------------------------------------


def test_an_idle_device_is_assigned_a_window_of_two_and_no_more(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker = fleet.worker()

    fleet.assign()

    assert fleet.held(worker) == [0, 1]


def test_every_assignment_is_to_be_rung(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker(0)
    fleet.worker(1)

    rings = fleet.assign()

    assert [(ring.device, ring.assignment.shard) for ring in rings] == [("h:0", 0), ("h:0", 1), ("h:1", 2), ("h:1", 3)]


def test_a_full_window_is_assigned_nothing(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker()
    fleet.assign()

    assert fleet.assign() == []


def test_a_half_full_window_is_topped_up(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    fleet.assign()
    fleet.job(samples=8)

    rings = fleet.assign()

    assert len(rings) == 1
    assert len(fleet.held(worker)) == 2


def test_an_assigned_shard_is_assigned_and_the_others_are_pending(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    fleet.worker()

    fleet.assign()

    assert fleet.shards(job) == ["assigned", "assigned", "pending", "pending"]


def test_a_job_runs_from_its_first_assignment(fleet: Fleet) -> None:
    job = fleet.job()
    fleet.worker()

    fleet.assign()

    assert fleet.state_of(job) is JobState.RUNNING


def test_an_assignment_says_all_a_worker_needs(fleet: Fleet) -> None:
    job = fleet.job(samples=8, bs=4)
    fleet.worker()

    assignment = fleet.assign()[1].assignment

    found = (assignment.job.spec, assignment.shard, assignment.attempt, assignment.start, assignment.stop)
    assert found == (job.spec, 1, 1, 4, 8)


def test_without_a_device_nothing_is_assigned(fleet: Fleet) -> None:
    fleet.job()

    assert fleet.assign() == []


def test_without_a_job_nothing_is_assigned(fleet: Fleet) -> None:
    fleet.worker()

    assert fleet.assign() == []


@pytest.mark.parametrize("state", [state for state in DeviceState if state is not DeviceState.UP])
def test_a_device_that_is_not_up_is_assigned_nothing(fleet: Fleet, state: DeviceState) -> None:
    fleet.job()
    fleet.put(fleet.worker(), state)

    assert fleet.assign() == []


def test_a_device_not_heard_of_for_a_lease_is_assigned_nothing(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()

    fleet.later(LEASE_S + 1)

    assert fleet.assign() == []


def test_a_device_heard_of_within_its_lease_is_assigned_work(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()

    fleet.later(LEASE_S - 5)

    assert len(fleet.assign()) == 2


def test_a_device_that_comes_late_takes_what_is_left(fleet: Fleet) -> None:
    fleet.job(samples=5)
    fleet.worker(0)
    fleet.assign()

    late = fleet.worker(1)
    fleet.assign()

    assert fleet.held(late) == [2, 3]


def test_a_slow_device_takes_fewer(fleet: Fleet) -> None:
    fleet.job(samples=20)
    slow, quick = fleet.worker(0), fleet.worker(1)
    slow.take()

    assert quick.finish() == 18
    assert fleet.held(slow) == [0, 1]


def test_of_two_jobs_a_lone_device_begins_with_the_older(fleet: Fleet) -> None:
    older, newer = fleet.job(samples=3), fleet.job(samples=3)
    worker = fleet.worker()

    assert [worker.take().job.id, worker.take().job.id] == [older.id, older.id]
    assert fleet.state_of(newer) is JobState.PENDING


def test_a_job_for_certain_devices_is_assigned_to_them_alone(fleet: Fleet) -> None:
    fleet.job(only=("h:1",))
    others = [fleet.worker(0), fleet.worker(2)]
    wanted = fleet.worker(1)

    fleet.assign()

    assert [len(fleet.held(worker)) for worker in [wanted, *others]] == [2, 0, 0]


def test_a_name_is_no_pattern_for_others(fleet: Fleet) -> None:
    """To SQL's LIKE an underscore is any letter."""
    fleet.job(only=("hax:0",))
    alike = fleet.worker(0, host="h_x")

    fleet.assign()

    assert not fleet.held(alike)


def test_a_job_is_assigned_to_devices_of_its_backend_alone(fleet: Fleet) -> None:
    fleet.job(backend="ort")
    fleet.worker(0, backends=("simulated",))
    fitting = fleet.worker(1, backends=("simulated", "ort"))

    fleet.assign()

    assert {ring.device for ring in fleet.assign()} <= {fitting.name}
    assert len(fleet.held(fitting)) == 2


def test_a_job_that_nobody_can_serve_does_not_hold_up_the_next(fleet: Fleet) -> None:
    fleet.job(backend="ort")
    servable = fleet.job()
    fleet.worker()

    assert [ring.assignment.job.id for ring in fleet.assign()] == [servable.id, servable.id]


def test_there_is_room_while_a_window_can_take_a_pending_shard(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()

    assert fleet.has_room()


def test_there_is_no_room_once_windows_are_full(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    fleet.assign()

    assert not fleet.has_room()


def test_there_is_no_room_once_nothing_is_pending(fleet: Fleet) -> None:
    fleet.job(samples=1)
    fleet.worker()
    fleet.assign()

    assert not fleet.has_room()


def test_there_is_no_room_on_a_device_not_heard_of_for_a_lease(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    fleet.later(LEASE_S + 1)

    assert not fleet.has_room()


# -- start -------------------------------------------------------------------------------------------------------


def test_a_started_attempt_and_its_shard_run(fleet: Fleet) -> None:
    job = fleet.job(samples=1)

    assignment = fleet.worker().take()

    assert (fleet.attempt(assignment).state, fleet.shards(job)) == ("running", ["running"])


def test_starting_answers_with_what_was_assigned(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assigned = fleet.assign()[0].assignment

    started = worker.start(assigned.attempt_id)

    assert started is not None
    found = started.assignment
    assert (found.attempt_id, found.task_id, found.job.spec) == (assigned.attempt_id, assigned.task_id, job.spec)


def test_starting_tells_what_waits(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker = fleet.worker()
    first, second = fleet.assign()

    started = worker.start(first.assignment.attempt_id)

    assert started is not None
    assert started.waiting is not None
    assert started.waiting.attempt_id == second.assignment.attempt_id


def test_starting_tells_of_nothing_that_waits_for_others(fleet: Fleet) -> None:
    fleet.job(samples=3)
    first, second = fleet.worker(0), fleet.worker(1)
    rings = fleet.assign()
    first.start(rings[0].assignment.attempt_id)
    first.start(rings[1].assignment.attempt_id)

    started = second.start(rings[2].assignment.attempt_id)

    assert started is not None
    assert started.waiting is None


def test_a_bell_that_rings_twice_starts_once(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()

    assignment = worker.take()

    assert worker.start(assignment.attempt_id) is None


def test_an_attempt_of_another_incarnation_is_not_started(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    assignment = fleet.assign()[0].assignment

    reborn = fleet.worker()

    assert reborn.start(assignment.attempt_id) is None


def test_an_attempt_of_another_device_is_not_started(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker(0)
    assignment = fleet.assign()[0].assignment

    assert fleet.worker(1).start(assignment.attempt_id) is None


def test_an_attempt_that_was_never_there_is_not_started(fleet: Fleet) -> None:
    assert fleet.worker().start(99) is None


def test_an_attempt_of_a_cancelled_job_is_not_started(fleet: Fleet) -> None:
    job = fleet.job()
    worker = fleet.worker()
    assignment = fleet.assign()[0].assignment
    fleet.cancel(job)

    assert worker.start(assignment.attempt_id) is None


def test_an_attempt_that_is_not_started_is_not_touched(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    assignment = fleet.assign()[0].assignment
    reborn = fleet.worker()
    before = fleet.everything()

    reborn.start(assignment.attempt_id)

    assert fleet.everything() == before


# -- complete ----------------------------------------------------------------------------------------------------


def test_completing_writes_a_row_for_each_sample(fleet: Fleet) -> None:
    job = fleet.job(samples=4, bs=4)
    worker = fleet.worker()

    worker.complete(worker.take())

    assert [row.name for row in fleet.rows(job)] == ["s0000", "s0001", "s0002", "s0003"]


def test_a_scored_row_holds_the_answer_and_who_gave_it(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()

    worker.complete(worker.take(), [scored("s0000", rank=3)])

    assert fleet.rows(job) == [
        results.Row(
            name="s0000",
            state=ResultState.SCORED,
            label=7,
            rank=3,
            classes=(7, 0, 1, 2, 3),
            scores=(5.5, 4.0, 3.0, 2.0, 1.0),
            sha256=None,
            reason="",
            device="h:0",
        )
    ]


def test_a_failed_row_holds_the_reason_and_no_answer(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()

    worker.complete(worker.take(), [failed("s0000", "x.bin was altered")])

    (row,) = fleet.rows(job)
    assert (row.state, row.reason, row.rank, row.classes, row.scores) == (
        ResultState.FAILED,
        "x.bin was altered",
        None,
        (),
        (),
    )


def test_completing_ends_the_shard_and_says_who_won(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()

    worker.complete(assignment)

    with database.read() as conn:
        shard = conn.execute(tables.shard.select().where(tables.shard.c.job_id == job.id)).one()
    assert (shard.state, shard.winner) == ("done", assignment.attempt_id)


def test_completing_ends_the_attempt_as_won(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    assignment = worker.take()

    worker.complete(assignment)

    assert fleet.attempt(assignment).state == "won"


def test_completing_assigns_the_devices_next_shard(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker = fleet.worker()
    assignment = worker.take()

    rings = worker.complete(assignment)

    assert rings is not None
    assert [(ring.device, ring.assignment.shard) for ring in rings] == [("h:0", 2)]
    assert fleet.held(worker) == [1, 2]


def test_completing_assigns_nothing_to_others(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker, idle = fleet.worker(0), fleet.worker(1)

    worker.complete(worker.take())

    assert fleet.held(idle) == []


def test_completing_the_last_shard_leaves_nothing_to_ring(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()

    assert worker.complete(worker.take()) == []


def test_completing_writes_nothing_if_the_next_assignment_breaks(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.job(samples=8)
    worker = fleet.worker()
    assignment = worker.take()
    before = fleet.everything()

    def break_off(*_: object, **__: object) -> None:
        raise StorageError("broke off")

    monkeypatch.setattr(shards, "assign", break_off)
    with pytest.raises(StorageError, match="broke off"):
        worker.complete(assignment)

    assert fleet.everything() == before


def test_completing_keeps_the_times_of_the_attempt(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=4, bs=4)
    worker = fleet.worker()

    worker.complete(worker.take())

    with database.read() as conn:
        (times,) = results.attempt_times(conn, job.id)
    assert (times.device, times.samples, times.batch_ms.tolist()) == ("h:0", 4, [[0.5, 10.0, 0.25]])
    assert (times.budget.device_ms, times.budget.read_ms) == (10.75, 2.0)
    assert times.started <= times.ended


@pytest.mark.parametrize("count", [0, 3, 5], ids=["none", "too few", "too many"])
def test_a_wrong_number_of_rows_is_an_alarm(fleet: Fleet, count: int) -> None:
    fleet.job(samples=4, bs=4)
    worker = fleet.worker()
    assignment = worker.take()

    with pytest.raises(InvariantBroken, match=rf"{assignment.task_id} has {count} rows for 4 samples"):
        worker.complete(assignment, [scored(name_of(number)) for number in range(count)])


def test_a_wrong_number_of_rows_changes_nothing(fleet: Fleet) -> None:
    fleet.job(samples=8, bs=4)
    worker = fleet.worker()
    assignment = worker.take()
    before = fleet.everything()

    with pytest.raises(InvariantBroken):
        worker.complete(assignment, samples_of(assignment)[1:])

    assert fleet.everything() == before


def taken_twice(fleet: Fleet) -> tuple[Worker, Assignment, list[SampleResult]]:
    """A second shard's attempt with rows of which one is the first shard's sample."""
    fleet.job(samples=12, bs=4)
    worker = fleet.worker()
    worker.complete(worker.take())
    second = worker.take()
    return worker, second, [scored("s0003"), *samples_of(second)[1:]]


def test_a_second_row_for_a_sample_is_an_alarm(fleet: Fleet) -> None:
    worker, assignment, rows = taken_twice(fleet)

    with pytest.raises(InvariantBroken, match="refused a row that must not exist"):
        worker.complete(assignment, rows)


def test_a_second_row_for_a_sample_changes_nothing(fleet: Fleet) -> None:
    worker, assignment, rows = taken_twice(fleet)
    before = fleet.everything()

    with pytest.raises(InvariantBroken):
        worker.complete(assignment, rows)

    assert fleet.everything() == before


def test_two_jobs_may_have_the_same_samples(fleet: Fleet) -> None:
    first, second = fleet.job(samples=2), fleet.job(samples=2)
    fleet.worker().finish()

    assert [row.name for row in fleet.rows(first)] == [row.name for row in fleet.rows(second)] == ["s0000", "s0001"]


def test_superseded_rows_do_not_collide_with_new_ones(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.finish()
    fleet.supersede(job)

    assert worker.finish() == 2


def test_superseded_rows_do_not_count(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.finish()
    fleet.supersede(job)

    worker.complete(worker.take(), [failed("s0000")])

    assert [(row.name, row.state) for row in fleet.rows(job)] == [("s0000", ResultState.FAILED)]


def test_a_shard_may_be_superseded_more_than_once(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    for _ in range(2):
        worker.finish()
        fleet.supersede(job)

    assert worker.finish() == 2


# -- zombies -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Zombie:
    """A worker with a finished attempt whose right to write is over."""

    worker: Worker
    assignment: Assignment

    def complete(self) -> object:
        return self.worker.complete(self.assignment)


def rescued(fleet: Fleet, worker: Worker, job: Job) -> None:
    fleet.later(LEASE_S + 1)
    fleet.rescue()


def started_anew(fleet: Fleet, worker: Worker, job: Job) -> None:
    fleet.worker()
    fleet.rescue()


def overtaken(fleet: Fleet, worker: Worker, job: Job) -> None:
    rescued(fleet, worker, job)
    fleet.worker(1).finish()


def handed_back(fleet: Fleet, worker: Worker, job: Job) -> None:
    worker.hand_back()


def cancelled(fleet: Fleet, worker: Worker, job: Job) -> None:
    fleet.cancel(job)


def job_failed(fleet: Fleet, worker: Worker, job: Job) -> None:
    with fleet.database.write() as conn:
        jobs.fail(conn, fleet.database, job.id, "no memory")


@pytest.fixture(params=[rescued, started_anew, overtaken, handed_back, cancelled, job_failed], ids=lambda f: f.__name__)
def zombie(request: pytest.FixtureRequest, fleet: Fleet) -> Zombie:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    assignment = worker.take()
    request.param(fleet, worker, job)
    return Zombie(worker, assignment)


def test_a_zombie_is_told_that_it_lost(zombie: Zombie) -> None:
    assert zombie.complete() is None


def test_a_zombie_writes_no_row_and_changes_no_shard_job_or_device(zombie: Zombie, fleet: Fleet) -> None:
    tables_it_may_not_touch = ("result", "shard", "job", "device")
    before = fleet.everything()

    zombie.complete()

    after = fleet.everything()
    assert [after[name] for name in tables_it_may_not_touch] == [before[name] for name in tables_it_may_not_touch]


def test_a_zombie_is_assigned_nothing(zombie: Zombie, fleet: Fleet) -> None:
    before = fleet.everything()

    zombie.complete()

    assert len(fleet.everything()["attempt"]) == len(before["attempt"])


def test_a_zombies_attempt_is_fenced(zombie: Zombie, fleet: Fleet) -> None:
    zombie.complete()

    assert fleet.attempt(zombie.assignment).state == "fenced"


def test_a_fenced_zombie_is_an_event(zombie: Zombie, fleet: Fleet) -> None:
    zombie.complete()

    (event,) = fleet.events("fenced")
    assert (event.attempt_id, event.shard_id, event.device) == (
        zombie.assignment.attempt_id,
        zombie.assignment.shard_id,
        "h:0",
    )


def test_what_a_zombie_had_can_be_done_by_another(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    zombie = fleet.worker(0)
    assignment = zombie.take()
    rescued(fleet, zombie, job)
    zombie.complete(assignment)

    fleet.worker(1).finish()

    assert [(row.name, row.device) for row in fleet.rows(job)] == [(name_of(number), "h:1") for number in range(4)]


def test_of_two_live_attempts_the_first_commit_wins(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    slow, quick = fleet.worker(0), fleet.worker(1)
    assignment = slow.take()
    rival = fleet.rival(assignment, quick)

    assert quick.complete(rival) is not None
    assert [row.device for row in fleet.rows(job)] == ["h:1"]


def test_of_two_live_attempts_the_slower_is_lost(fleet: Fleet) -> None:
    fleet.job(samples=1)
    slow, quick = fleet.worker(0), fleet.worker(1)
    assignment = slow.take()

    quick.complete(fleet.rival(assignment, quick))

    assert fleet.attempt(assignment).state == "lost"


def test_of_two_live_attempts_the_slower_comes_too_late(fleet: Fleet) -> None:
    fleet.job(samples=1)
    slow, quick = fleet.worker(0), fleet.worker(1)
    assignment = slow.take()
    quick.complete(fleet.rival(assignment, quick))

    assert slow.complete(assignment) is None


def test_a_shard_with_a_second_live_attempt_is_not_reopened_when_one_breaks(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    first, second = fleet.worker(0), fleet.worker(1)
    assignment = first.take()
    fleet.rival(assignment, second)

    first.fail(assignment)

    assert fleet.shards(job) == ["running"]


def test_an_attempt_that_won_wins_once(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    worker.complete(assignment)

    assert worker.complete(assignment) is None


def test_an_attempt_that_won_stays_won(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    worker.complete(assignment)

    worker.complete(assignment)

    assert fleet.attempt(assignment).state == "won"


def test_an_attempt_of_a_shard_that_is_done_does_not_win(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    fleet.close_shard(assignment)

    assert worker.complete(assignment) is None
    assert fleet.rows(job) == []


def test_an_attempt_that_broke_does_not_win(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    worker.fail(assignment)

    assert worker.complete(assignment) is None
    assert fleet.rows(job) == []


def test_an_attempt_that_was_not_started_does_not_win(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()

    assert worker.complete(fleet.assign()[0].assignment) is None
    assert fleet.rows(job) == []


@pytest.mark.parametrize("index", [0, 1], ids=["another incarnation", "another device"])
def test_an_attempt_is_not_completed_by_another_worker(fleet: Fleet, index: int) -> None:
    job = fleet.job(samples=1)
    assignment = fleet.worker().take()

    assert fleet.worker(index).complete(assignment) is None
    assert fleet.rows(job) == []


# -- devices -----------------------------------------------------------------------------------------------------


def test_each_start_of_a_worker_is_a_new_incarnation(fleet: Fleet) -> None:
    assert [fleet.worker().incarnation for _ in range(3)] == [1, 2, 3]


def test_incarnations_are_counted_for_each_device(fleet: Fleet) -> None:
    fleet.worker(0)

    assert fleet.worker(1).incarnation == 1


def test_a_worker_that_starts_anew_is_up_again(fleet: Fleet) -> None:
    fleet.worker().leave()

    assert fleet.worker().device.state is DeviceState.UP


def test_devices_come_by_host_and_number(fleet: Fleet, database: Database) -> None:
    for index in (10, 2, 0):
        fleet.worker(index)

    with database.read() as conn:
        assert [device.name for device in devices.everything(conn)] == ["h:0", "h:2", "h:10"]


def test_a_new_incarnation_orphans_the_old_ones_attempts_at_once(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    assigned = fleet.assign()

    fleet.worker()

    assert fleet.orphans() == [ring.assignment.attempt_id for ring in assigned]


def test_a_rescued_shard_is_pending_and_its_attempt_lost(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    assignment = fleet.worker().take()
    fleet.worker()

    fleet.rescue()

    assert (fleet.shards(job), fleet.attempt(assignment).state) == (["pending", "pending"], "lost")


def test_a_rescue_is_an_event_for_each_attempt(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    assigned = fleet.assign()
    fleet.worker()

    fleet.rescue()

    found = [event.attempt_id for event in fleet.events("attempt_lost")]
    assert found == [ring.assignment.attempt_id for ring in assigned]


def test_a_second_rescue_finds_nothing(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    fleet.assign()
    fleet.worker()

    assert (fleet.rescue(), fleet.rescue()) == (2, 0)


def test_a_rescued_shard_is_assigned_as_its_second_attempt(fleet: Fleet) -> None:
    fleet.job(samples=1)
    fleet.worker().take()
    reborn = fleet.worker()
    fleet.rescue()

    assert reborn.take().task_id == "j1.s0.a2"


def test_a_device_not_heard_of_within_its_lease_is_no_orphan(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker().take()

    fleet.later(LEASE_S - 5)

    assert fleet.orphans() == []


def test_a_device_not_heard_of_for_a_lease_is_an_orphan(fleet: Fleet) -> None:
    fleet.job(samples=1)
    assignment = fleet.worker().take()

    fleet.later(LEASE_S + 1)

    assert fleet.orphans() == [assignment.attempt_id]


def test_a_heartbeat_begins_the_lease_anew(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    worker.take()
    fleet.later(LEASE_S - 5)
    worker.beat()

    fleet.later(LEASE_S - 5)

    assert fleet.orphans() == []


def test_one_devices_heartbeat_is_no_others(fleet: Fleet) -> None:
    fleet.job(samples=1)
    silent = fleet.worker(0)
    assignment = silent.take()
    beating = fleet.worker(1)
    fleet.later(LEASE_S + 1)

    beating.beat()

    assert fleet.orphans() == [assignment.attempt_id]


def test_a_farm_whose_clock_is_late_judges_by_its_own(fleet: Fleet, database: Database) -> None:
    fleet.job(samples=1)
    fleet.worker().take()
    ahead = Database(database.url.render_as_string(hide_password=False), clock_offset_s=LEASE_S + 1)

    found = Fleet(ahead).orphans()
    ahead.close()

    assert len(found) == 1


def test_a_gone_devices_attempts_are_orphans(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()

    worker.leave()

    assert fleet.orphans() == [assignment.attempt_id]


def test_a_quarantined_device_keeps_what_it_runs(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()

    fleet.put(worker, DeviceState.QUARANTINED)

    assert fleet.orphans() == []
    assert worker.complete(assignment) is not None


def test_an_attempt_that_ended_is_no_orphan(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    worker.complete(worker.take())

    fleet.worker()

    assert fleet.orphans() == []


def test_a_heartbeat_tells_which_attempts_may_still_win(fleet: Fleet) -> None:
    fleet.job(samples=3)
    worker = fleet.worker(0)
    fleet.worker(1)
    rings = fleet.assign()

    assert worker.beat() == frozenset(ring.assignment.attempt_id for ring in rings if ring.device == worker.name)


def test_a_heartbeat_no_longer_tells_of_what_was_taken_away(fleet: Fleet) -> None:
    job = fleet.job()
    worker = fleet.worker()
    worker.take()

    fleet.cancel(job)

    assert worker.beat() == frozenset()


def test_a_heartbeat_does_not_tell_of_the_attempts_of_the_incarnation_before(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker().take()

    assert fleet.worker().beat() == frozenset()


def test_an_old_incarnations_heartbeat_says_that_it_has_to_go(fleet: Fleet) -> None:
    old = fleet.worker()

    fleet.worker()

    assert old.beat() is None


def test_an_old_incarnations_heartbeat_does_not_keep_the_device_alive(fleet: Fleet) -> None:
    old, new = fleet.worker(), fleet.worker()
    before = new.device.heartbeat
    fleet.later(10)

    old.beat()

    assert new.device.heartbeat == before


def test_a_worker_that_leaves_says_so(fleet: Fleet) -> None:
    worker = fleet.worker()

    assert worker.leave()
    assert worker.device.state is DeviceState.GONE


def test_a_worker_that_leaves_is_an_event(fleet: Fleet) -> None:
    fleet.worker().leave()

    assert [event.device for event in fleet.events("device_gone")] == ["h:0"]


def test_a_worker_leaves_once(fleet: Fleet) -> None:
    worker = fleet.worker()
    worker.leave()

    assert not worker.leave()


def test_an_old_incarnation_that_leaves_does_not_take_the_device_along(fleet: Fleet) -> None:
    old, new = fleet.worker(), fleet.worker()

    assert not old.leave()
    assert new.device.state is DeviceState.UP


def test_a_worker_that_leaves_does_not_take_other_devices_along(fleet: Fleet) -> None:
    leaving, staying = fleet.worker(0), fleet.worker(1)

    leaving.leave()

    assert staying.device.state is DeviceState.UP


def test_a_quarantined_device_stays_so_when_its_worker_leaves(fleet: Fleet) -> None:
    worker = fleet.worker()
    fleet.put(worker, DeviceState.QUARANTINED)

    assert not worker.leave()
    assert worker.device.state is DeviceState.QUARANTINED


def test_a_leaving_worker_hands_back_all_it_holds(fleet: Fleet) -> None:
    job = fleet.job(samples=3)
    worker = fleet.worker()
    worker.take()

    assert worker.hand_back() == 2
    assert fleet.shards(job) == ["pending"] * 3


def test_a_leaving_worker_hands_back_nothing_of_others(fleet: Fleet) -> None:
    fleet.job(samples=8)
    leaving, staying = fleet.worker(0), fleet.worker(1)
    fleet.assign()

    leaving.hand_back()

    assert fleet.held(staying) == [2, 3]


def test_an_old_incarnation_hands_back_nothing_of_the_new_one(fleet: Fleet) -> None:
    fleet.job()
    old, new = fleet.worker(), fleet.worker()
    new.take()

    assert old.hand_back() == 0


def test_handing_back_twice_is_harmless(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    worker.take()

    assert (worker.hand_back(), worker.hand_back()) == (2, 0)


# -- failures ----------------------------------------------------------------------------------------------------


def fail_often(worker: Worker, times: int, failure: Failure = Failure.DEVICE) -> None:
    for _ in range(times):
        worker.fail(worker.take(), failure)


def test_a_failed_attempt_says_how(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    assignment = worker.take()

    worker.fail(assignment, Failure.HANG, "no answer within 15 s")

    attempt = fleet.attempt(assignment)
    assert (attempt.state, attempt.failure, attempt.reason) == ("failed", "hang", "no answer within 15 s")


def test_a_failed_attempt_is_an_event(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    assignment = worker.take()

    worker.fail(assignment, Failure.HANG, "no answer within 15 s")

    (event,) = fleet.events("attempt_hang")
    assert (event.attempt_id, event.device, event.text) == (assignment.attempt_id, "h:0", "no answer within 15 s")


def test_a_failed_shard_is_pending_again(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    fleet.worker(1)
    worker = fleet.worker(0)

    worker.fail(worker.take())

    assert fleet.shards(job) == ["pending"]


def test_a_device_whose_attempt_failed_is_given_something_else(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker = fleet.worker(0)
    fleet.worker(1)

    rings = worker.fail(worker.take())

    assert [ring.assignment.shard for ring in rings] == [2]


def test_a_shard_that_is_done_is_not_reopened(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    fleet.close_shard(assignment)

    worker.fail(assignment)

    assert fleet.shards(job) == ["done"]


def test_a_failed_shard_goes_to_another_device_first(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker, other = fleet.worker(0), fleet.worker(1)

    worker.fail(worker.take())

    assert worker.try_to_take() is None
    assert other.take().attempt == 2


def test_a_failed_shard_goes_back_to_a_device_that_is_alone(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()

    worker.fail(worker.take())

    assert worker.take().attempt == 2


def test_a_failed_shard_goes_back_if_the_other_device_may_not_have_it(fleet: Fleet) -> None:
    fleet.job(samples=1, only=("h:0",))
    worker = fleet.worker(0)
    fleet.worker(1)

    worker.fail(worker.take())

    assert worker.take().attempt == 2


def test_a_failed_shard_goes_back_once_the_other_device_is_gone(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker, other = fleet.worker(0), fleet.worker(1)
    worker.fail(worker.take())

    other.leave()

    assert worker.take().attempt == 2


def test_an_attempt_that_was_taken_away_does_not_fail(fleet: Fleet) -> None:
    job = fleet.job()
    worker = fleet.worker()
    assignment = worker.take()
    fleet.cancel(job)
    before = fleet.everything()

    worker.fail(assignment)

    assert fleet.everything() == before


def test_three_failures_of_a_device_quarantine_it(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()

    fail_often(worker, 3)

    assert worker.device.state is DeviceState.QUARANTINED


def test_two_failures_of_a_device_do_not_quarantine_it(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()

    fail_often(worker, 2)

    assert worker.device.state is DeviceState.UP


def test_a_success_forgives_a_device_its_failures(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    fail_often(worker, 2)

    worker.complete(worker.take())
    fail_often(worker, 2)

    assert worker.device.state is DeviceState.UP


def test_a_quarantine_is_an_event_with_its_reason(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    fail_often(worker, 2)

    worker.fail(worker.take(), Failure.DEVICE, "driver gone")

    (event,) = fleet.events("device_quarantined")
    assert (event.device, event.text) == ("h:0", "driver gone")


def test_a_quarantine_releases_what_waits(fleet: Fleet) -> None:
    job = fleet.job(samples=5)
    worker = fleet.worker()

    fail_often(worker, 3)

    assert fleet.held(worker) == []
    assert fleet.shards(job) == ["pending"] * 5


def test_a_quarantine_leaves_what_runs(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    running = worker.take()

    fail_often(worker, 3)

    assert fleet.attempt(running).state == "running"


def test_what_a_quarantine_releases_goes_to_another_device(fleet: Fleet) -> None:
    fleet.job(samples=5)
    worker = fleet.worker(0)
    fail_often(worker, 3)

    assert fleet.worker(1).finish() == 5


@pytest.mark.parametrize("failure", BREAKING)
def test_a_device_that_breaks_where_others_might_not_gets_a_strike(fleet: Fleet, failure: Failure) -> None:
    fleet.job()
    worker = fleet.worker(0)
    fleet.worker(1)

    worker.fail(worker.take(), failure)

    assert worker.device.strikes == 1


@pytest.mark.parametrize("failure", [*BREAKING, Failure.DEVICE])
def test_a_device_that_breaks_at_what_another_has_done_meanwhile_gets_a_strike(fleet: Fleet, failure: Failure) -> None:
    job = fleet.job(samples=1)
    slow, quick = fleet.worker(0), fleet.worker(1)
    assignment = slow.take()
    quick.complete(fleet.rival(assignment, quick))

    assert slow.fail(assignment, failure) == []

    assert (slow.device.strikes, quick.device.strikes) == (1, 0)
    assert [event.attempt_id for event in fleet.events(f"attempt_{failure.value}")] == [assignment.attempt_id]
    assert [row.device for row in fleet.rows(job)] == ["h:1"]


@pytest.mark.parametrize("failure", [Failure.HOST, Failure.NON_FINITE, Failure.JOB])
def test_what_is_no_fault_of_the_device_is_none_either_where_another_was_faster(fleet: Fleet, failure: Failure) -> None:
    fleet.job(samples=1)
    slow, quick = fleet.worker(0), fleet.worker(1)
    assignment = slow.take()
    quick.complete(fleet.rival(assignment, quick))

    slow.fail(assignment, failure)

    assert slow.device.strikes == 0


def test_a_device_that_breaks_at_what_nobody_has_done_since_gets_no_strike(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker(0)
    fleet.worker(1)
    assignment = worker.take()
    fleet.cancel(job)

    worker.fail(assignment, Failure.HANG)

    assert worker.device.strikes == 0


def test_the_third_failure_at_what_others_have_done_quarantines_a_device(fleet: Fleet) -> None:
    fleet.job(samples=12)
    slow, quick = fleet.worker(0), fleet.worker(1)
    for _ in range(3):
        assignment = slow.take()
        quick.complete(fleet.rival(assignment, quick))
        slow.fail(assignment, Failure.HANG)

    assert slow.device.state is DeviceState.QUARANTINED


@pytest.mark.parametrize("failure", BREAKING)
def test_a_device_that_breaks_alone_gets_no_strike(fleet: Fleet, failure: Failure) -> None:
    fleet.job()
    worker = fleet.worker()

    worker.fail(worker.take(), failure)

    assert worker.device.strikes == 0


def test_a_shard_that_breaks_a_second_device_clears_the_first_one(fleet: Fleet) -> None:
    fleet.job(samples=1)
    first, second = fleet.worker(0), fleet.worker(1)
    first.fail(first.take(), Failure.CRASH)

    second.fail(second.take(), Failure.HANG)

    assert (first.device.strikes, second.device.strikes) == (0, 0)


def test_scores_that_are_no_numbers_are_no_strike(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker(0)
    fleet.worker(1)

    worker.fail(worker.take(), Failure.NON_FINITE)

    assert worker.device.strikes == 0


@pytest.mark.parametrize("second", BREAKING)
@pytest.mark.parametrize("first", BREAKING)
def test_a_shard_that_breaks_two_devices_is_rerun_isolating(fleet: Fleet, first: Failure, second: Failure) -> None:
    fleet.job(samples=1)
    a, b = fleet.worker(0), fleet.worker(1)
    a.fail(a.take(), first)

    (ring,) = b.fail(b.take(), second)

    assert ring.assignment.isolating
    assert b.take().isolating


def test_a_shard_that_breaks_a_lone_device_twice_is_rerun_isolating(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    fail_often(worker, 2, Failure.CRASH)

    assert worker.take().isolating


@pytest.mark.parametrize("failure", BREAKING)
def test_a_shard_that_broke_one_device_is_not_isolating(fleet: Fleet, failure: Failure) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    worker.fail(worker.take(), failure)

    assert not worker.take().isolating


def test_a_shard_that_devices_refused_is_not_isolating(fleet: Fleet) -> None:
    fleet.job(samples=1)
    first, second, third = (fleet.worker(index) for index in range(3))
    for worker in (first, second):
        worker.fail(worker.take(), Failure.DEVICE)

    assert not third.take().isolating


def test_other_shards_are_not_isolating(fleet: Fleet) -> None:
    fleet.job(samples=2, only=("h:0",))
    worker = fleet.worker()
    first = worker.take()
    worker.fail(first, Failure.CRASH)
    other = worker.take()
    worker.complete(other)
    fail_often(worker, 1, Failure.CRASH)
    isolating = worker.take()

    assert (other.shard, other.isolating, isolating.shard, isolating.isolating) == (1, False, 0, True)


def test_an_isolating_attempt_is_an_event(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    fail_often(worker, 2, Failure.CRASH)

    assignment = worker.take()

    assert [event.attempt_id for event in fleet.events("isolating")] == [assignment.attempt_id]


def test_the_attempt_after_scores_that_are_no_numbers_knows_of_them(fleet: Fleet) -> None:
    fleet.job(samples=1)
    first, second = fleet.worker(0), fleet.worker(1)
    first.fail(first.take(), Failure.NON_FINITE)

    (ring,) = fleet.assign()

    assert ring.assignment.non_finite_before
    assert second.take().non_finite_before


@pytest.mark.parametrize("failure", [Failure.CRASH, Failure.HANG, Failure.DEVICE])
def test_the_attempt_after_another_failure_knows_of_no_such_scores(fleet: Fleet, failure: Failure) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    worker.fail(worker.take(), failure)

    assert not worker.take().non_finite_before


@pytest.mark.parametrize("failure", [Failure.CRASH, Failure.HANG, Failure.NON_FINITE])
def test_six_failures_of_a_shard_fail_its_job(fleet: Fleet, failure: Failure) -> None:
    job = fleet.job(samples=4, bs=4)
    worker = fleet.worker()
    fail_often(worker, 5, failure)

    worker.fail(worker.take(), failure, "SIGSEGV")

    found = fleet.again(job)
    assert (found.state, found.error) == (
        JobState.FAILED,
        "samples 0 to 3 failed 6 times, last on h:0: SIGSEGV",
    )


def test_five_failures_of_a_shard_do_not_fail_its_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)

    fail_often(fleet.worker(), 5, Failure.CRASH)

    assert fleet.state_of(job) is JobState.RUNNING


def test_what_some_devices_refuse_does_not_fail_a_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    workers = [fleet.worker(index) for index in range(4)]

    for worker in workers[:3]:
        worker.fail(worker.take(), Failure.DEVICE)

    assert fleet.state_of(job) is JobState.RUNNING


def test_what_every_device_refuses_fails_the_job_and_is_held_against_none(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    workers = [fleet.worker(index) for index in range(3)]

    for worker in workers:
        worker.fail(worker.take(), Failure.DEVICE, "no such operator")

    assert fleet.state_of(job) is JobState.FAILED
    assert "no device can do samples 0 to 0: no such operator" in fleet.again(job).error
    assert [worker.device.strikes for worker in workers] == [0, 0, 0]


def test_what_a_lone_device_refuses_twice_fails_the_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()

    fail_often(worker, 2, Failure.DEVICE)

    assert fleet.state_of(job) is JobState.FAILED


def test_a_batch_that_the_backend_blames_twice_is_isolated(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()

    fail_often(worker, 2, Failure.DATA)

    assert worker.take().isolating


def test_a_device_whose_strikes_were_the_works_fault_takes_work_again(fleet: Fleet) -> None:
    worker = fleet.worker()
    with fleet.database.write() as conn:
        devices.strike(conn, fleet.database, worker.name, 3, "three bad shards")
        devices.strike(conn, fleet.database, worker.name, -1, "")

    assert worker.device.state is DeviceState.UP


def test_an_attempt_lost_overnight_ended_when_its_device_was_last_heard_of(fleet: Fleet) -> None:
    fleet.job(samples=1)
    attempt = fleet.worker().take()
    with fleet.database.read() as conn:
        before = fleet.database.now(conn)
    fleet.later(36_000)

    with fleet.database.write() as conn:
        shards.abandon(conn, fleet.database, "h:0")
        ((_, ended),) = results.spent(conn, attempt.job.id)

    assert ended <= before + 1


def test_settling_does_not_overwrite_a_cancelled_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    worker.complete(worker.take())
    fleet.cancel(job)

    assert fleet.settle(job) is JobState.CANCELLED


def test_attempts_that_were_lost_do_not_fail_a_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)

    for _ in range(7):
        fleet.worker().take()
        fleet.worker()
        fleet.rescue()

    assert fleet.state_of(job) is JobState.RUNNING


def test_what_no_device_can_do_fails_the_job_with_the_text(fleet: Fleet) -> None:
    job = fleet.job()
    worker = fleet.worker()

    worker.fail(worker.take(), Failure.JOB, "no memory at bs 1")

    found = fleet.again(job)
    assert (found.state, found.error, found.finished is not None) == (JobState.FAILED, "no memory at bs 1", True)


def test_what_no_device_can_do_ends_the_jobs_other_attempts(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker, other = fleet.worker(0), fleet.worker(1)
    elsewhere = other.take()

    worker.fail(worker.take(), Failure.JOB)

    assert fleet.attempt(elsewhere).state == "lost"
    assert (fleet.held(worker), fleet.held(other)) == ([], [])


def test_what_no_device_can_do_ends_the_jobs_open_shards(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    worker.complete(worker.take())

    worker.fail(worker.take(), Failure.JOB)

    assert fleet.shards(job) == ["done", "failed", "failed", "failed"]


def test_what_no_device_can_do_leaves_other_jobs_alone(fleet: Fleet) -> None:
    fleet.job(samples=1)
    other = fleet.job(samples=1)
    worker = fleet.worker()

    worker.fail(worker.take(), Failure.JOB)

    assert worker.take().job.id == other.id


# -- cancel ------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_says_so(fleet: Fleet) -> None:
    job = fleet.job()

    fleet.cancel(job)

    found = fleet.again(job)
    assert (found.state, found.error, found.finished is not None) == (JobState.CANCELLED, "cancelled by its user", True)


def test_cancelling_takes_assigned_and_running_attempts_away(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    running = worker.take()

    fleet.cancel(job)

    assert fleet.attempt(running).state == "lost"
    assert fleet.held(worker) == []


def test_cancelling_keeps_what_is_done(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    worker.complete(worker.take())
    worker.take()

    fleet.cancel(job)

    assert fleet.shards(job) == ["done", "cancelled", "cancelled", "cancelled"]
    assert [row.name for row in fleet.rows(job)] == ["s0000"]


def test_a_cancelled_job_is_assigned_no_more(fleet: Fleet) -> None:
    job = fleet.job()
    fleet.worker()

    fleet.cancel(job)

    assert fleet.assign() == []


def test_cancelling_frees_the_windows_for_other_jobs(fleet: Fleet) -> None:
    first, second = fleet.job(), fleet.job()
    fleet.worker()
    fleet.assign()

    fleet.cancel(first)

    assert [ring.assignment.job.id for ring in fleet.assign()] == [second.id, second.id]


def test_cancelling_twice_changes_nothing(fleet: Fleet) -> None:
    job = fleet.job()
    fleet.cancel(job)
    before = fleet.everything()

    assert not fleet.cancel(job)
    assert fleet.everything() == before


def test_a_job_that_is_done_is_not_cancelled(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    fleet.worker().finish()
    fleet.settle(job)

    assert not fleet.cancel(job)
    assert fleet.state_of(job) is JobState.DONE


def test_a_cancelled_job_does_not_fail(fleet: Fleet) -> None:
    job = fleet.job()
    fleet.cancel(job)

    with fleet.database.write() as conn:
        assert not jobs.fail(conn, fleet.database, job.id, "too late")
    assert fleet.again(job).error == "cancelled by its user"


# -- settle ------------------------------------------------------------------------------------------------------


def finish_with(fleet: Fleet, *rows: SampleResult) -> Job:
    """A job of one shard that ends with these rows, not settled yet."""
    job = fleet.job(samples=len(rows), shards=[(0, len(rows))])
    worker = fleet.worker()
    worker.complete(worker.take(), rows)
    return job


def test_a_job_whose_samples_are_all_scored_is_done(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"), scored("b"))

    assert fleet.settle(job) is JobState.DONE
    assert fleet.state_of(job) is JobState.DONE


def test_a_job_with_failed_samples_is_done_with_errors(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"), failed("b"))

    assert fleet.settle(job) is JobState.DONE_WITH_ERRORS
    assert fleet.state_of(job) is JobState.DONE_WITH_ERRORS


def test_a_settled_job_knows_when(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"))

    fleet.settle(job)

    found = fleet.again(job)
    assert found.finished is not None
    assert found.finished >= job.created


def test_a_row_that_is_missing_fails_the_job(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"), scored("b"))
    fleet.delete_row(job, "b")

    assert fleet.settle(job) is JobState.FAILED
    assert fleet.again(job).error == ("refused to settle: 1 result rows for 2 samples; the database was altered")


def test_superseded_rows_do_not_make_up_for_missing_ones(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"), scored("b"))
    fleet.supersede(job)
    worker = fleet.worker()
    worker.complete(worker.take(), [scored("c"), scored("d")])
    fleet.delete_row(job, "c")
    fleet.delete_row(job, "b")

    assert fleet.settle(job) is JobState.FAILED


def test_superseded_rows_do_not_stand_in_the_way_of_settling(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.finish()
    fleet.supersede(job)
    worker.finish()

    assert fleet.settle(job) is JobState.DONE


def test_settling_twice_changes_nothing(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"))
    fleet.settle(job)
    before = fleet.everything()

    assert fleet.settle(job) is JobState.DONE
    assert fleet.everything() == before


def test_settling_a_cancelled_job_leaves_it_cancelled(fleet: Fleet) -> None:
    job = fleet.job()
    fleet.cancel(job)

    assert fleet.settle(job) is JobState.CANCELLED
    assert fleet.state_of(job) is JobState.CANCELLED


def test_a_job_whose_shards_have_all_ended_is_to_be_settled(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"))

    assert fleet.finished_but_open() == [job.id]


def test_a_job_with_an_open_shard_is_not_to_be_settled(fleet: Fleet) -> None:
    fleet.job(samples=2)
    worker = fleet.worker()
    worker.complete(worker.take())

    assert fleet.finished_but_open() == []


def test_a_settled_job_is_not_to_be_settled_again(fleet: Fleet) -> None:
    fleet.settle(finish_with(fleet, scored("a")))

    assert fleet.finished_but_open() == []


# -- ringing again -----------------------------------------------------------------------------------------------


def test_an_idle_device_that_does_not_answer_is_rung_again(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker()
    rings = fleet.assign()

    fleet.later(3)

    again = fleet.unheard()
    assert [(r.device, r.assignment.task_id) for r in again] == [(r.device, r.assignment.task_id) for r in rings]


def test_an_idle_device_is_given_time_to_answer(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    fleet.assign()

    assert fleet.unheard(ring_again_s=60) == []


def test_a_device_that_was_rung_again_is_given_time_to_answer(fleet: Fleet) -> None:
    fleet.job()
    fleet.worker()
    rings = fleet.assign()
    fleet.later(60)

    fleet.rang(rings)

    assert fleet.unheard(ring_again_s=60) == []


def test_a_busy_device_is_not_rung_again(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker().take()

    fleet.later(3)

    assert fleet.unheard() == []


def test_a_busy_device_does_not_keep_an_idle_one_from_being_rung_again(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker(0).take()
    idle = fleet.worker(1)
    fleet.assign()

    fleet.later(3)

    assert [ring.device for ring in fleet.unheard()] == [idle.name, idle.name]


def test_a_device_that_leaves_is_not_rung_again(fleet: Fleet) -> None:
    fleet.job(samples=8)
    worker = fleet.worker()
    fleet.assign()
    worker.leave()

    fleet.later(3)

    assert fleet.unheard() == []


# -- what reports read -------------------------------------------------------------------------------------------


def test_rows_come_in_name_order(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("b"), scored("a"), scored("B"))

    assert [row.name for row in fleet.rows(job)] == ["B", "a", "b"]


def test_rows_can_be_chosen_by_state(fleet: Fleet, database: Database) -> None:
    job = finish_with(fleet, scored("a"), failed("b"))

    with database.read() as conn:
        assert [row.name for row in results.rows(conn, job.id, state=ResultState.FAILED)] == ["b"]


def test_rows_can_be_limited(fleet: Fleet, database: Database) -> None:
    job = finish_with(fleet, scored("a"), scored("b"), scored("c"))

    with database.read() as conn:
        assert [row.name for row in results.rows(conn, job.id, limit=2)] == ["a", "b"]


def test_attempts_are_counted_by_how_they_ended(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    fail_often(worker, 1, Failure.CRASH)
    fail_often(worker, 1, Failure.DEVICE)
    worker.finish()

    with database.read() as conn:
        assert results.attempts_by_state(conn, job.id) == {"won": 2, "crash": 1, "device": 1}


def test_time_was_spent_by_every_attempt_that_ran_and_ended(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=8)
    worker = fleet.worker()
    worker.fail(worker.take())
    worker.complete(worker.take())
    worker.take()

    with database.read() as conn:
        assert len(results.spent(conn, job.id)) == 2


def test_times_are_those_of_attempts_that_won(fleet: Fleet, database: Database) -> None:
    job = fleet.job(samples=8)
    worker = fleet.worker()
    worker.fail(worker.take())
    worker.complete(worker.take())
    worker.take()

    with database.read() as conn:
        assert len(results.attempt_times(conn, job.id)) == 1


def test_winners_are_named_by_shard_with_their_hosts_and_what_counts_nowhere_is_useless(
    fleet: Fleet, database: Database
) -> None:
    job = fleet.job(samples=8)
    first, second = fleet.worker(0), fleet.worker(1)
    lost = first.take()
    first.hand_back()
    won = second.take()
    second.complete(won)
    running = second.take()

    with database.read() as conn:
        (winner,) = results.winners(conn, job.id)
        assert (winner.shard, winner.attempt_id, winner.host, winner.samples) == (won.shard, won.attempt_id, "h", 1)
        known = {lost.attempt_id, won.attempt_id, running.attempt_id}
        assert results.useless(conn, known | {10**9}) == {lost.attempt_id}


def test_a_devices_speed_is_samples_over_the_time_it_was_busy(fleet: Fleet, database: Database) -> None:
    """A batch of 4 in 0.5 + 10 + 0.25 ms."""
    job = fleet.job(samples=8, bs=4)
    fleet.worker().finish()

    with database.read() as conn:
        assert results.throughput(conn, job.spec.artifact.sha256) == pytest.approx(4 / 10.75e-3)


def test_an_artifact_that_never_ran_has_no_speed(fleet: Fleet, database: Database) -> None:
    job = fleet.job()

    with database.read() as conn:
        assert results.throughput(conn, job.spec.artifact.sha256) is None


# -- many at once ------------------------------------------------------------------------------------------------


def at_once(*calls: Callable[[], object]) -> list[object]:
    """What each of some calls answers that begin together, in threads of their own."""
    together = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


def lives(fleet: Fleet, states: Sequence[str]) -> list[int]:
    """How often each shard was attempted with these ends."""
    counted: dict[int, int] = {}
    for attempt in fleet.everything()["attempt"]:
        if attempt.state in states:
            counted[attempt.shard_id] = counted.get(attempt.shard_id, 0) + 1
    return sorted(counted.values())


def test_four_devices_at_once_win_every_shard_once(fleet: Fleet) -> None:
    job = fleet.job(samples=60)
    workers = [fleet.worker(index) for index in range(4)]

    at_once(*(worker.finish for worker in workers))

    assert fleet.shards(job) == ["done"] * 60
    assert lives(fleet, ["won"]) == [1] * 60
    assert fleet.settle(job) is JobState.DONE


def test_four_coordinators_at_once_assign_every_shard_once(fleet: Fleet) -> None:
    fleet.job(samples=60)
    for index in range(20):
        fleet.worker(index)

    at_once(*[fleet.assign] * 4)

    assert lives(fleet, ["assigned"]) == [1] * 40


def test_an_attempt_that_is_completed_four_times_at_once_wins_once(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()

    answers = at_once(*[lambda: worker.complete(assignment)] * 4)

    assert sorted(map(str, answers)) == ["None", "None", "None", "[]"]
    assert len(fleet.rows(job)) == 1


def test_of_two_attempts_of_a_shard_that_end_at_once_one_wins(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    first, second = fleet.worker(0), fleet.worker(1)
    assignment = first.take()
    rival = fleet.rival(assignment, second)

    answers = at_once(lambda: first.complete(assignment), lambda: second.complete(rival))

    assert sorted(map(str, answers)) == ["None", "[]"]
    assert len(fleet.rows(job)) == 1


def test_four_settlers_at_once_settle_once(fleet: Fleet) -> None:
    job = finish_with(fleet, scored("a"))

    assert at_once(*[lambda: fleet.settle(job)] * 4) == [JobState.DONE] * 4
    assert len(fleet.events("job_done")) == 1


def test_a_rescue_and_a_late_commit_at_once_leave_one_truth(fleet: Fleet) -> None:
    job = fleet.job(samples=10)
    worker = fleet.worker(0)
    late = [worker.take() for _ in range(2)]
    fleet.later(LEASE_S + 1)
    other = fleet.worker(1)

    at_once(fleet.rescue, *(lambda a=a: worker.complete(a) for a in late))
    other.finish()

    assert lives(fleet, ["won"]) == [1] * 10
    assert fleet.settle(job) is JobState.DONE


# -- what must not be taken for an end ---------------------------------------------------------------------------


def test_a_job_with_open_shards_is_not_settled(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    worker.complete(worker.take())
    worker.take()

    fleet.settle(job)

    assert fleet.state_of(job) is JobState.RUNNING


def test_an_attempt_that_another_worker_completes_stays_live(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker(0)
    assignment = worker.take()

    fleet.worker(1).complete(assignment)

    assert worker.complete(assignment) is not None


def test_an_attempt_that_was_not_started_stays_assigned(fleet: Fleet) -> None:
    fleet.job(samples=1)
    worker = fleet.worker()
    (ring,) = fleet.assign()

    worker.complete(ring.assignment)

    assert worker.start(ring.assignment.attempt_id) is not None


def test_a_device_that_another_clears_is_released_from_quarantine(fleet: Fleet) -> None:
    fleet.job(samples=3)
    first, second = fleet.worker(0), fleet.worker(1)
    fail_often(first, 3, Failure.CRASH)
    quarantined = first.device.state

    while (taken := second.try_to_take()) and taken.attempt == 2:
        second.fail(taken, Failure.CRASH)

    assert (quarantined, first.device.state) == (DeviceState.QUARANTINED, DeviceState.UP)
