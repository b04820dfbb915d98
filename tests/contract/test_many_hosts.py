"""Sharing, draining, quarantine, canaries, hosts that lack something, second attempts, and doing things again."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from sqlalchemy import select

from db import devices, overview, shards, tables
from farm.errors import UsageError
from farm.jobs import AttemptState, DeviceState, Failure, Job, JobState, ShardState, Verdict
from tests.contract.conftest import LEASE_S, Fleet, Worker, canary_of, failed, name_of, samples_of, scored

#: SQLite serves one.
of_many_hosts = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def jobs_held(fleet: Fleet) -> Counter[int]:
    """By job, how many shards of it were handed out just now."""
    return Counter(ring.assignment.job.id for ring in fleet.assign())


# -- whose turn it is --------------------------------------------------------------------------------------------


def test_a_job_of_higher_priority_goes_first(fleet: Fleet) -> None:
    fleet.job(samples=4)
    urgent = fleet.job(samples=4, priority=5)
    fleet.worker()

    assert jobs_held(fleet) == {urgent.id: 2}


def test_a_job_of_lower_priority_gets_what_the_higher_leaves(fleet: Fleet) -> None:
    urgent, other = fleet.job(samples=1, priority=1), fleet.job(samples=4)
    fleet.worker()

    assert jobs_held(fleet) == {urgent.id: 1, other.id: 1}


def test_jobs_of_equal_priority_share_the_devices(fleet: Fleet) -> None:
    one, other = fleet.job(samples=40), fleet.job(samples=40)
    for index in range(4):
        fleet.worker(index)

    assert jobs_held(fleet) == {one.id: 4, other.id: 4}


def test_jobs_submitted_together_are_done_one_after_another(fleet: Fleet) -> None:
    first = fleet.job(samples=5)
    second = fleet.job(samples=8, submission=first.id)
    other = fleet.job(samples=8)
    for index in range(4):
        fleet.worker(index)

    assert jobs_held(fleet) == {first.id: 4, other.id: 4}
    fleet.cancel(other)
    assert jobs_held(fleet) == {first.id: 1, second.id: 3}


def test_a_job_that_comes_later_gets_its_share(fleet: Fleet) -> None:
    fleet.job(samples=100)
    workers = [fleet.worker(index) for index in range(4)]
    fleet.assign()
    later = fleet.job(samples=100)

    for _ in range(3):
        for worker in workers:
            worker.complete(worker.take())

    live = Counter(number for worker in workers for number in [fleet_job(fleet, worker)])
    assert live[later.id] == 2


def fleet_job(fleet: Fleet, worker: Worker) -> int:
    """The job whose shard a device takes up next."""
    return worker.take().job.id


def test_a_device_stays_with_the_job_whose_model_it_has(fleet: Fleet) -> None:
    fleet.job(samples=100)
    fleet.job(samples=100)
    workers = [fleet.worker(index) for index in range(2)]
    fleet.assign()

    served: list[set[int]] = [set(), set()]
    for _ in range(10):
        for worker, mine in zip(workers, served, strict=True):
            assignment = worker.take()
            mine.add(assignment.job.id)
            worker.complete(assignment)

    assert [len(mine) for mine in served] == [1, 1]


def test_a_lone_device_gives_way_to_a_job_that_nobody_serves(fleet: Fleet) -> None:
    fleet.job(samples=100)
    other = fleet.job(samples=100)
    worker = fleet.worker()

    served = []
    for _ in range(40):
        assignment = worker.take()
        served.append(assignment.job.id)
        worker.complete(assignment)

    assert other.id in served
    assert sum(one != two for one, two in pairwise(served)) <= 3


# -- draining ----------------------------------------------------------------------------------------------------


def test_a_drained_device_finishes_what_it_runs_and_gets_nothing_more(fleet: Fleet) -> None:
    job = fleet.job(samples=6)
    worker = fleet.worker()
    running = worker.take()

    fleet.drain(worker)

    assert fleet.held(worker) == [running.shard]
    assert worker.complete(running) == []
    assert fleet.shards(job)[0] == ShardState.DONE.value
    assert fleet.held(worker) == []


def test_a_drained_device_stays_so_when_its_worker_starts_anew(fleet: Fleet) -> None:
    fleet.job()
    fleet.drain(fleet.worker())

    again = fleet.worker()

    assert fleet.assign() == []
    assert again.device.drained
    assert not fleet.has_room()


def test_a_device_that_is_drained_no_more_takes_work(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    fleet.drain(worker)
    fleet.undrain(worker)

    assert len(fleet.assign()) == 2
    assert len(fleet.events("device_drained")) == len(fleet.events("device_undrained")) == 1


# -- quarantine --------------------------------------------------------------------------------------------------


def quarantined(fleet: Fleet) -> Worker:
    """A device that failed three shards, which another one can do."""
    fleet.worker(1)
    worker = fleet.worker(0)
    for _ in range(3):
        worker.fail(worker.take(), reason="driver error 507011")
    assert worker.device.state is DeviceState.QUARANTINED
    return worker


def test_a_quarantine_says_why(fleet: Fleet) -> None:
    fleet.job(samples=20)

    assert "507011" in quarantined(fleet).device.reason


def test_a_quarantine_outlives_its_worker(fleet: Fleet) -> None:
    fleet.job(samples=20)
    quarantined(fleet)

    again = fleet.worker(0)

    assert again.device.state is DeviceState.QUARANTINED
    assert again.try_to_take() is None


def test_strikes_are_forgotten_with_a_new_worker_but_not_in_quarantine(fleet: Fleet) -> None:
    fleet.job(samples=20)
    fleet.worker(1)
    worker = fleet.worker(0)
    worker.fail(worker.take())

    assert worker.device.strikes == 1
    assert fleet.worker(0).device.strikes == 0


# -- canaries ----------------------------------------------------------------------------------------------------


def test_a_lone_device_is_unverified(fleet: Fleet) -> None:
    assert fleet.worker().answer("x") is Verdict.UNVERIFIED


def test_devices_that_say_the_same_agree(fleet: Fleet) -> None:
    first, second = fleet.worker(0), fleet.worker(1)
    first.answer("x")

    assert second.answer("x") is Verdict.AGREES
    assert first.device.state is second.device.state is DeviceState.UP


def test_two_that_differ_are_both_in_dispute(fleet: Fleet) -> None:
    first, second = fleet.worker(0), fleet.worker(1)
    first.answer("x")

    assert second.answer("y") is Verdict.DISPUTED
    assert first.device.state is second.device.state is DeviceState.UP
    assert len(fleet.events("canary_disputed")) == 2


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_one_that_most_disagree_with_is_found_out(fleet: Fleet, wrong: int) -> None:
    workers = [fleet.worker(index) for index in range(3)]
    for index, worker in enumerate(workers):
        worker.answer("y" if index == wrong else "x")

    states = [worker.device.state for worker in workers]
    assert states == [DeviceState.QUARANTINED if index == wrong else DeviceState.UP for index in range(3)]
    assert "canary 0" in workers[wrong].device.reason


def test_answers_to_different_canaries_are_not_compared(fleet: Fleet) -> None:
    fleet.worker(0).answer("x", number=0)

    assert fleet.worker(1).answer("y", number=1) is Verdict.UNVERIFIED


def test_answers_of_different_artifacts_are_not_compared(fleet: Fleet) -> None:
    fleet.worker(0).answer("x", artifact="a")

    assert fleet.worker(1).answer("y", artifact="b") is Verdict.UNVERIFIED


@pytest.mark.parametrize("far", [2e-3, float("nan"), float("inf")])
def test_a_device_far_from_the_reference_is_found_out_alone(fleet: Fleet, far: float) -> None:
    worker = fleet.worker()

    assert worker.answer("x", far=far) is Verdict.DISAGREES
    assert worker.device.state is DeviceState.QUARANTINED
    assert "onnxruntime" in worker.device.reason


def test_a_device_close_to_the_reference_is_not(fleet: Fleet) -> None:
    worker = fleet.worker()

    assert worker.answer("x", far=5e-4) is Verdict.UNVERIFIED
    assert worker.device.state is DeviceState.UP


def test_a_lone_device_that_changes_its_answer_is_found_out(fleet: Fleet) -> None:
    worker = fleet.worker()
    worker.answer("x")

    assert worker.answer("y") is Verdict.DISAGREES


def test_of_two_that_differ_the_one_that_changed_its_answer_is_found_out(fleet: Fleet) -> None:
    first, second = fleet.worker(0), fleet.worker(1)
    first.answer("x")
    second.answer("x")

    assert second.answer("y") is Verdict.DISAGREES
    assert [first.device.state, second.device.state] == [DeviceState.UP, DeviceState.QUARANTINED]
    assert first.answer("x") is Verdict.UNVERIFIED
    assert second.answer("y") is Verdict.DISPUTED
    assert second.answer("x") is Verdict.AGREES


def test_a_wrong_answer_costs_the_attempt_and_quarantines_the_device(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    artifact = job.spec.artifact.sha256
    for index in (1, 2):
        fleet.worker(index).answer("x", artifact=artifact)
    wrong = fleet.worker(0)
    assignment = wrong.take()

    assert wrong.complete(assignment, canary=canary_of("y", artifact=artifact)) == []

    assert wrong.device.state is DeviceState.QUARANTINED
    assert fleet.attempt(assignment).state == AttemptState.FAILED.value
    assert fleet.rows(job) == []
    assert set(fleet.shards(job)) == {ShardState.PENDING.value}


def test_what_a_wrong_device_won_before_it_was_found_out_is_open_again(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    artifact = job.spec.artifact.sha256
    wrong = fleet.worker(0)
    wrong.complete(wrong.take(), canary=canary_of("y", artifact=artifact))
    wrong.complete(wrong.take())
    assert len(fleet.rows(job)) == 2

    others = [fleet.worker(1), fleet.worker(2)]
    for other in others:
        other.answer("x", artifact=artifact)

    assert wrong.device.state is DeviceState.QUARANTINED
    assert fleet.rows(job) == []
    others[0].finish()
    assert fleet.settle(job) is JobState.DONE
    assert {row.device for row in fleet.rows(job)} == {"h:1"}


def test_what_a_wrong_device_is_running_when_others_find_it_out_counts_no_more(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    artifact = job.spec.artifact.sha256
    wrong = fleet.worker(0)
    wrong.complete(wrong.take(), canary=canary_of("y", artifact=artifact))
    running = wrong.take()

    for index in (1, 2):
        fleet.worker(index).answer("x", artifact=artifact)

    assert wrong.device.state is DeviceState.QUARANTINED
    assert fleet.held(wrong) == []
    assert wrong.complete(running) is None
    assert fleet.rows(job) == []


def test_what_a_device_won_before_its_last_right_answer_stays(fleet: Fleet) -> None:
    job = fleet.job(samples=6)
    artifact = job.spec.artifact.sha256
    others = [fleet.worker(1), fleet.worker(2)]
    turns_bad = fleet.worker(0)
    for other in others:
        other.answer("x", artifact=artifact)
        other.answer("x", artifact=artifact, number=1)
    turns_bad.complete(turns_bad.take(), canary=canary_of("x", artifact=artifact))
    fleet.later(5)
    turns_bad.complete(turns_bad.take())

    turns_bad.answer("y", artifact=artifact, number=1)

    assert [row.name for row in fleet.rows(job)] == [name_of(0)]


# -- hosts that lack something -----------------------------------------------------------------------------------


@of_many_hosts
def test_a_host_that_lacks_something_is_skipped_for_that_job_alone(fleet: Fleet) -> None:
    job, other = fleet.job(samples=8), fleet.job(samples=8)
    here = [fleet.worker(0, host="a"), fleet.worker(1, host="a")]
    fleet.worker(0, host="b")
    declined = here[0].take()
    assert declined.job.id == job.id

    here[0].decline(declined, "manifest differs")

    assert fleet.attempt(declined).state == AttemptState.LOST.value
    for worker in here:
        assert worker.take().job.id == other.id
    assert fleet.state_of(job) is JobState.RUNNING
    assert "manifest differs" in fleet.events("host_unfit")[0].text


@of_many_hosts
def test_a_worker_that_starts_anew_has_its_host_looked_at_again(fleet: Fleet) -> None:
    job = fleet.job(samples=8)
    here = fleet.worker(0, host="a")
    fleet.worker(0, host="b")
    here.decline(here.take(), "manifest differs")
    assert here.try_to_take() is None

    again = fleet.worker(0, host="a")

    assert again.take().job.id == job.id


@of_many_hosts
def test_a_declined_shard_is_done_elsewhere_and_no_attempt_is_counted(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    other = fleet.worker(0, host="b")
    for index in range(7):  # more hosts than a shard has attempts
        worker = fleet.worker(0, host=f"a{index}")
        worker.decline(worker.take())

    assert other.finish() == 4
    assert fleet.settle(job) is JobState.DONE


@of_many_hosts
def test_a_job_that_no_host_can_do_fails_with_every_hosts_reason(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    first, second = fleet.worker(0, host="a"), fleet.worker(0, host="b")
    first.decline(first.take(), "no bins")
    assert fleet.state_of(job) is JobState.RUNNING

    second.decline(second.take(), "another artifact")

    assert fleet.state_of(job) is JobState.FAILED
    assert "a: no bins" in fleet.again(job).error
    assert "b: another artifact" in fleet.again(job).error


@of_many_hosts
def test_a_host_that_just_restarts_is_waited_for(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    first, second = fleet.worker(0, host="a"), fleet.worker(0, host="b")
    second.leave()

    first.decline(first.take(), "no bins")

    assert fleet.state_of(job) is JobState.RUNNING


@of_many_hosts
def test_a_shard_whose_bins_one_host_cannot_use_goes_to_another_host(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    here, beside, there = fleet.worker(0, host="a"), fleet.worker(1, host="a"), fleet.worker(0, host="b")

    here.fail(here.take(), Failure.HOST, "s0000: altered")

    assert beside.try_to_take() is None
    there.complete(there.take())
    assert fleet.settle(job) is JobState.DONE
    assert here.device.strikes == 0


# -- slow devices ------------------------------------------------------------------------------------------------

TWENTIES = [(start, start + 20) for start in range(0, 200, 20)]


def with_a_pace(fleet: Fleet, slowness: float) -> tuple[Job, Worker, Worker]:
    """A job of batches of two, of which two devices have done shards; one took so many times as long for its own."""
    job = fleet.job(samples=200, bs=2, shards=TWENTIES)
    slow, quick = fleet.worker(0), fleet.worker(1)
    for worker, seconds in ((quick, 1.0), (quick, 1.0), (quick, 1.0), (slow, slowness)):
        assignment = worker.take()
        fleet.later(seconds)
        assert worker.complete(assignment) is not None
    slow.complete(slow.take())  # handed out before anything was known
    return job, slow, quick


def cut_of(fleet: Fleet, job: Job) -> list[tuple[int, int]]:
    with fleet.database.read() as conn:
        s = tables.shard.c
        return sorted((row.start, row.stop) for row in conn.execute(select(s.start, s.stop).where(s.job_id == job.id)))


def test_a_slow_device_takes_no_more_of_a_shard_than_it_does_in_the_usual_time(fleet: Fleet) -> None:
    job, slow, _quick = with_a_pace(fleet, 10)

    taken = slow.take()

    assert (taken.start % 20, taken.stop - taken.start) == (0, 2)
    found = cut_of(fleet, job)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert (found[0][0], found[-1][1]) == (0, 200)


def test_a_slow_device_is_known_when_the_next_job_begins(fleet: Fleet) -> None:
    job, slow, quick = with_a_pace(fleet, 10)
    fleet.cancel(job)
    again = fleet.job(samples=200, bs=2, shards=TWENTIES)

    taken = slow.take()

    assert taken.job.id == again.id
    assert taken.stop - taken.start <= 4
    whole = quick.take()
    assert whole.stop - whole.start == 20


def test_a_job_with_a_slow_device_ends_with_a_row_a_sample(fleet: Fleet) -> None:
    job, slow, quick = with_a_pace(fleet, 10)

    while taken := slow.try_to_take():
        assert slow.complete(taken) is not None
        quick.finish()

    assert fleet.settle(job) is JobState.DONE
    assert [row.name for row in fleet.rows(job)] == [name_of(number) for number in range(200)]


def test_a_device_that_is_not_much_slower_takes_whole_shards(fleet: Fleet) -> None:
    job, slow, _quick = with_a_pace(fleet, 2)

    slow.take()

    assert cut_of(fleet, job) == TWENTIES


def test_a_shard_that_broke_elsewhere_stays_whole(fleet: Fleet) -> None:
    job, slow, quick = with_a_pace(fleet, 10)
    broken = quick.take()
    quick.fail(broken, Failure.CRASH)

    while taken := slow.try_to_take():
        slow.complete(taken)

    assert (broken.start, broken.stop) in cut_of(fleet, job)


# -- second attempts ---------------------------------------------------------------------------------------------


def with_a_slow_one(fleet: Fleet) -> tuple[Worker, Worker]:
    """At the end of a job one device still has two shards, and another one has nothing to do."""
    slow, quick = fleet.worker(0), fleet.worker(1)
    slow.take()
    while (assignment := quick.try_to_take()) is not None:
        fleet.later(1)
        assert quick.complete(assignment) is not None
    fleet.later(9)
    for worker in (slow, quick):
        worker.beat()
    return slow, quick


def test_at_the_end_an_idle_device_takes_a_second_attempt_of_a_slow_shard(fleet: Fleet) -> None:
    job = fleet.job(samples=8)
    slow, quick = with_a_slow_one(fleet)

    fleet.speculate()

    assert quick.finish() == 2
    assert fleet.settle(job) is JobState.DONE
    assert len(fleet.events("speculated")) == 1
    assert fleet.held(slow) == []


def test_the_slow_one_writes_nothing_when_the_second_attempt_has_won(fleet: Fleet) -> None:
    job = fleet.job(samples=8)
    slow, quick = fleet.worker(0), fleet.worker(1)
    loser = slow.take()
    for _ in range(6):
        fleet.later(1)
        quick.complete(quick.take())
    fleet.later(9)
    slow.beat(), quick.beat()
    fleet.speculate()
    quick.finish()

    assert slow.complete(loser) is None
    assert len(fleet.rows(job)) == 8


def test_the_slow_one_may_still_win(fleet: Fleet) -> None:
    job = fleet.job(samples=8)
    slow, quick = fleet.worker(0), fleet.worker(1)
    first = slow.take()
    for _ in range(6):
        fleet.later(1)
        quick.complete(quick.take())
    fleet.later(9)
    slow.beat(), quick.beat()
    fleet.speculate()
    second = quick.take()
    assert second.shard_id == first.shard_id

    assert slow.complete(first) is not None
    assert quick.complete(second) is None
    quick.finish()
    assert fleet.settle(job) is JobState.DONE


def test_a_shard_has_at_most_two_attempts_at_once(fleet: Fleet) -> None:
    fleet.job(samples=8)
    with_a_slow_one(fleet)
    fleet.worker(2)

    assert len(fleet.speculate()) == 2
    assert fleet.speculate() == []


def test_there_is_no_second_attempt_before_anything_is_known_of_the_job(fleet: Fleet) -> None:
    fleet.job(samples=1)
    slow, idle = fleet.worker(0), fleet.worker(1)
    slow.take()
    fleet.later(20)
    slow.beat(), idle.beat()

    assert fleet.speculate() == []


def test_a_device_that_is_as_fast_as_the_others_is_left_alone(fleet: Fleet) -> None:
    fleet.job(samples=5)
    first, second, _idle = fleet.worker(0), fleet.worker(1), fleet.worker(2)
    for _ in range(2):
        assignment = first.take()
        fleet.later(4)
        first.complete(assignment)
    second.take()
    fleet.later(4)

    assert fleet.speculate() == []


# -- doing things again ------------------------------------------------------------------------------------------


def done_with_a_failed_sample(fleet: Fleet) -> tuple[Worker, int]:
    job = fleet.job(samples=4, shards=[(0, 2), (2, 4)])
    worker = fleet.worker()
    worker.complete(worker.take(), [scored(name_of(0)), failed(name_of(1))])
    worker.finish()
    assert fleet.settle(job) is JobState.DONE_WITH_ERRORS
    return worker, job.id


def test_retry_computes_shards_with_failed_samples_again_and_no_others(fleet: Fleet) -> None:
    job = fleet.job(samples=4, shards=[(0, 2), (2, 4)])
    worker = fleet.worker()
    first = worker.take()
    worker.complete(first, [scored(name_of(0)), failed(name_of(1))])
    worker.finish()
    fleet.settle(job)

    assert fleet.retry(job) == 1

    assert fleet.shards(job) == [ShardState.PENDING.value, ShardState.DONE.value]
    assert fleet.again(job).finished is None
    again = worker.take()
    assert (again.start, again.stop, again.attempt) == (0, 2, 2)
    worker.complete(again)
    assert fleet.settle(job) is JobState.DONE
    assert [row.name for row in fleet.rows(job)] == [name_of(number) for number in range(4)]
    kept = [row for row in fleet.everything()["result"] if row.superseded]
    assert [(row.name, row.superseded) for row in kept] == [(name_of(n), first.attempt_id) for n in (0, 1)]


def test_retry_twice_keeps_every_generation(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    for _ in range(3):
        worker.complete(worker.take(), [failed(name_of(0))])
        fleet.settle(job)
        fleet.retry(job)
    worker.finish()

    assert fleet.settle(job) is JobState.DONE
    assert len(fleet.everything()["result"]) == 4


def test_retry_of_a_job_without_failed_samples_changes_nothing(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    fleet.worker().finish()
    fleet.settle(job)

    assert fleet.retry(job) == 0
    assert fleet.state_of(job) is JobState.DONE


def test_retry_of_a_running_job_is_refused(fleet: Fleet) -> None:
    with pytest.raises(UsageError, match="not finished"):
        fleet.retry(fleet.job())


def test_resume_goes_on_with_a_cancelled_job(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    worker = fleet.worker()
    worker.complete(worker.take())
    fleet.cancel(job)

    assert fleet.resume(job) == 3

    assert worker.finish() == 3
    assert fleet.settle(job) is JobState.DONE


def test_resume_goes_on_with_a_failed_job_as_if_nothing_had_been_tried(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    for _ in range(6):
        worker.fail(worker.take(), Failure.NON_FINITE)
    assert fleet.state_of(job) is JobState.FAILED

    fleet.resume(job)

    assignment = worker.take()
    assert not assignment.non_finite_before
    worker.fail(assignment, Failure.NON_FINITE)
    assert fleet.state_of(job) is JobState.RUNNING


def test_resume_forgets_which_hosts_could_not_do_the_job(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    worker.decline(worker.take())
    assert fleet.state_of(job) is JobState.FAILED

    fleet.resume(job)

    assert worker.finish() == 1


def test_resume_fills_the_hole_that_a_deleted_row_left(fleet: Fleet) -> None:
    job = fleet.job(samples=4, shards=[(0, 2), (2, 4)])
    worker = fleet.worker()
    worker.finish()
    fleet.delete_row(job, name_of(3))
    assert fleet.settle(job) is JobState.FAILED

    assert fleet.resume(job) == 1

    worker.finish()
    assert fleet.settle(job) is JobState.DONE


@pytest.mark.parametrize("state", ["running", "done"])
def test_resume_of_a_job_that_was_not_stopped_is_refused(fleet: Fleet, state: str) -> None:
    job = fleet.job(samples=1)
    if state == "done":
        fleet.worker().finish()
        fleet.settle(job)

    with pytest.raises(UsageError, match="goes on by itself" if state == "running" else "farm retry"):
        fleet.resume(job)


def test_what_a_distrusted_device_did_since_then_is_done_again(fleet: Fleet) -> None:
    job = fleet.job(samples=4)
    bad, good = fleet.worker(0), fleet.worker(1)
    bad.complete(bad.take())
    fleet.later(10)
    since = fleet.now()
    bad.complete(bad.take())
    good.finish()
    bad.hand_back()
    good.finish()
    fleet.settle(job)

    reopened = fleet.distrust(bad, since)

    assert (reopened.jobs, reopened.shards, reopened.samples) == ((job.id,), 1, 1)
    assert fleet.state_of(job) is JobState.RUNNING
    fleet.drain(bad)
    good.finish()
    assert fleet.settle(job) is JobState.DONE
    assert Counter(row.device for row in fleet.rows(job)) == {"h:0": 1, "h:1": 3}


def test_a_distrusted_devices_speed_is_not_measured_again(fleet: Fleet) -> None:
    job = fleet.job(samples=0, shards=[(0, 0)], only=("h:0",))
    bad = fleet.worker(0)
    bad.complete(bad.take())
    fleet.settle(job)

    reopened = fleet.distrust(bad, 0.0)

    assert reopened.shards == 0
    assert fleet.state_of(job) is JobState.DONE


def test_a_job_of_a_simulated_chip_is_not_done_by_whatever_else_simulates(fleet: Fleet) -> None:
    job = fleet.job(samples=4, soc="simulated 310P3")
    slot, chip = fleet.worker(0), fleet.worker(1, soc="simulated 310P3")

    assert slot.try_to_take() is None
    assert chip.finish() == 4
    assert fleet.settle(job) is JobState.DONE


def test_a_late_commit_of_a_shard_that_was_reopened_is_fenced(fleet: Fleet) -> None:
    job = fleet.job(samples=1)
    worker = fleet.worker()
    assignment = worker.take()
    worker.complete(assignment)
    fleet.settle(job)
    fleet.distrust(worker, 0.0)

    assert worker.complete(assignment) is None
    assert fleet.rows(job) == []


def test_a_cancelled_jobs_distrusted_shards_wait_for_its_resumption(fleet: Fleet) -> None:
    job = fleet.job(samples=2)
    worker = fleet.worker()
    worker.complete(worker.take())
    fleet.cancel(job)

    fleet.distrust(worker, 0.0)

    assert fleet.state_of(job) is JobState.CANCELLED
    assert fleet.resume(job) == 2


# -- who is who --------------------------------------------------------------------------------------------------


def test_two_machines_of_one_name_are_refused(fleet: Fleet) -> None:
    fleet.worker(machine="one")

    with pytest.raises(UsageError, match="FARM_HOST"):
        fleet.worker(machine="two")


def test_a_machine_may_take_the_name_of_one_that_is_gone(fleet: Fleet) -> None:
    fleet.worker(machine="one")
    fleet.later(LEASE_S + 1)

    assert fleet.worker(machine="two").incarnation == 2


def test_a_second_host_is_refused_by_a_database_of_one_host(fleet: Fleet) -> None:
    fleet.worker(host="a")

    if fleet.database.is_sqlite:
        with pytest.raises(UsageError, match="SQLite serves one host only"):
            fleet.worker(host="b")
    else:
        assert fleet.worker(host="b").incarnation == 1


def test_rows_of_a_reopened_shard_are_those_of_its_second_winner(fleet: Fleet) -> None:
    worker, job_id = done_with_a_failed_sample(fleet)
    with fleet.database.read() as conn:
        from db import jobs

        job = jobs.get(conn, job_id)
    fleet.retry(job)
    again = worker.take()
    worker.complete(again, samples_of(again))
    fleet.settle(job)

    assert all(row.classes for row in fleet.rows(job))


def test_who_did_not_hear_of_its_start_may_start_again(fleet: Fleet) -> None:
    fleet.job()
    worker = fleet.worker()
    taken = worker.take()

    assert worker.start(taken.attempt_id) is None
    again = worker.start(taken.attempt_id, again=True)
    assert again is not None
    assert again.assignment == taken
    worker.complete(taken)
    assert worker.start(taken.attempt_id, again=True) is None


# -- chips -------------------------------------------------------------------------------------------------------


def test_a_shard_goes_to_devices_with_its_jobs_chip_only(fleet: Fleet) -> None:
    job = fleet.job(samples=8, backend="acl", soc="Ascend310P3")
    fleet.worker(0, backends=("acl",), soc="Ascend310P1")
    fitting = fleet.worker(1, backends=("acl",), soc="Ascend310P3")
    fleet.worker(2, backends=("acl",), soc="Ascend310P")

    with fleet.database.read() as conn:
        assert shards.with_room(conn, fleet.database, LEASE_S) == [fitting.name]
    assert {ring.device for ring in fleet.assign()} == {fitting.name}
    with fleet.database.read() as conn:
        everything = devices.everything(conn)
        assert [d.name for d in devices.matching(everything, job.spec.artifact, ())] == [fitting.name]
        assert shards.with_room(conn, fleet.database, LEASE_S) == []


def test_a_simulated_job_goes_to_devices_of_any_chip(fleet: Fleet) -> None:
    fleet.job(samples=8)
    fleet.worker(0, soc="Ascend310P3")
    fleet.worker(1)

    assert len({ring.device for ring in fleet.assign()}) == 2


def test_a_job_whose_chip_no_device_has_that_is_there_has_no_host_left(fleet: Fleet) -> None:
    job = fleet.job(backend="acl", soc="Ascend310P3")
    fleet.worker(0, backends=("acl",), soc="Ascend310P1")

    with fleet.database.read() as conn:
        assert shards.hosts_left(conn, fleet.database, job, LEASE_S) == set()


def test_how_a_device_is_joins_what_is_known_of_it(fleet: Fleet) -> None:
    fleet.worker(0, machine="m")

    with fleet.database.write() as conn:
        for name, degrees in (("h:0", 41), ("h:7", 1), ("h:0", 42)):
            devices.observe(conn, name, {"temperature_c": degrees})
        (found,) = devices.everything(conn)

    assert found.info == {"machine": "m", "temperature_c": 42}


def test_a_job_tells_which_of_its_devices_were_used_by_force(fleet: Fleet) -> None:
    fleet.worker(0, forced="its health was Alarm")
    job = fleet.job(samples=8)
    fleet.worker(0, forced="its health is Alarm")
    fleet.worker(1)
    other = fleet.worker(2, forced="its health is Critical")
    fleet.put(other, DeviceState.QUARANTINED)
    fleet.assign()

    with fleet.database.read() as conn:
        assert overview.forced(conn, job.id) == [("h:0", "its health is Alarm")]
