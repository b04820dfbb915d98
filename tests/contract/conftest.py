"""Every store there is, and a fleet of devices on it whose workers are the test itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, insert, select, update

from db import devices, jobs, reopen, results, shards, tables
from db.devices import Registration
from db.engine import Database
from db.shards import Ring, Started
from farm import artifacts, zoo
from farm.jobs import (
    LIVE,
    Assignment,
    AttemptState,
    Budget,
    Canary,
    DeviceState,
    Failure,
    Job,
    JobSpec,
    JobState,
    ResultState,
    SampleResult,
    ShardResult,
    ShardState,
    Verdict,
)
from farm.sharding import cut, edges

LEASE_S = 30.0


#: The stores that keep the contract, each with the fixture that has the URL of an empty one.
STORES = {"sqlite": "sqlite_url", "postgres": "postgres_url"}


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'farm.db'}"


@pytest.fixture(params=STORES)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = Database(request.getfixturevalue(STORES[request.param]))
    database.ensure_schema()
    yield database
    database.close()


@pytest.fixture
def fleet(database: Database) -> Fleet:
    return Fleet(database)


def name_of(number: int) -> str:
    return f"s{number:04d}"


def scored(name: str, *, rank: int = 1) -> SampleResult:
    return SampleResult(
        name=name,
        state=ResultState.SCORED,
        label=7,
        rank=rank,
        classes=(7, 0, 1, 2, 3),
        scores=(5.5, 4.0, 3.0, 2.0, 1.0),
    )


def failed(name: str, reason: str = "altered") -> SampleResult:
    return SampleResult(name=name, state=ResultState.FAILED, label=7, reason=reason)


def samples_of(assignment: Assignment) -> list[SampleResult]:
    return [scored(name_of(number)) for number in range(assignment.start, assignment.stop)]


def result_of(samples: Sequence[SampleResult]) -> ShardResult:
    return ShardResult(samples=samples, batch_ms=[(0.5, 10.0, 0.25)], budget=Budget(device_ms=10.75, read_ms=2.0))


def canary_of(digest: str, *, number: int = 0, artifact: str = "a", far: float | None = None) -> Canary:
    return Canary(artifact_sha256=artifact, number=number, digest=digest, max_abs_diff=far, tolerance=1e-3, ms=10.0)


class Fleet:
    """What a test says of the database, in one line each. `later` moves the one clock."""

    def __init__(self, database: Database) -> None:
        self.database = database

    # -- given ---------------------------------------------------------------------------------------------------

    def job(
        self,
        samples: int = 8,
        *,
        bs: int = 1,
        backend: str = "simulated",
        soc: str = "cpu",
        only: tuple[str, ...] = (),
        priority: int = 0,
        submission: int | None = None,
        shards: Sequence[tuple[int, int]] | None = None,
    ) -> Job:
        """A job of as many shards as batches, unless it says which."""
        artifact = artifacts.simulated(zoo.get("lvvit"), bs).model_copy(update={"backend": backend, "soc": soc})
        spec = JobSpec(
            model="lvvit",
            bs=bs,
            artifact=artifact,
            dataset="imagenet",
            recipe="lvvit",
            dtype="float32",
            manifest_digest="0" * 64,
            samples=samples,
            devices=only,
            priority=priority,
            provenance={},
        )
        with self.database.write() as conn:
            return jobs.create(
                conn,
                self.database,
                spec,
                shards or cut(edges([1] * samples, bs), per_shard=1, per_last=1, devices=1),
                submission,
            )

    def worker(
        self,
        index: int = 0,
        *,
        host: str = "h",
        backends: tuple[str, ...] = ("simulated",),
        soc: str = "cpu",
        machine: str | None = None,
        forced: str = "",
    ) -> Worker:
        """The start of a device's worker: a new incarnation."""
        registration = Registration(
            name=f"{host}:{index}",
            host=host,
            index=index,
            soc=soc,
            backends=backends,
            pid=4242,
            pid_started=1.0,
            kind="cpu",
            info={"machine": machine} | ({"forced": forced} if forced else {}),
        )
        with self.database.write() as conn:
            return Worker(self, registration.name, devices.register(conn, self.database, registration, LEASE_S))

    def later(self, seconds: float) -> None:
        self.database.clock_offset_s += seconds

    def put(self, worker: Worker, state: DeviceState) -> None:
        """What it takes verbs a while to do: a device in a state."""
        with self.database.write() as conn:
            d = tables.device
            conn.execute(update(d).where(d.c.name == worker.name).values(state=state.value))

    def delete_row(self, job: Job, name: str) -> None:
        """What no verb does: a result row is gone."""
        with self.database.write() as conn:
            r = tables.result
            conn.execute(r.delete().where(r.c.job_id == job.id, r.c.name == name))

    def supersede(self, job: Job) -> None:
        """Open a job's done shards again; its rows count no more."""
        with self.database.write() as conn:
            r, s = tables.result, tables.shard
            conn.execute(update(r).where(r.c.job_id == job.id).values(superseded=r.c.attempt_id))
            reopened = {"state": ShardState.PENDING.value, "winner": None}
            conn.execute(update(s).where(s.c.job_id == job.id).values(**reopened))

    def close_shard(self, assignment: Assignment) -> None:
        """What no verb does: a shard is done although its attempt is live."""
        with self.database.write() as conn:
            s = tables.shard
            conn.execute(update(s).where(s.c.id == assignment.shard_id).values(state=ShardState.DONE.value))

    def rival(self, assignment: Assignment, worker: Worker) -> Assignment:
        """A second live attempt of a shard, running on another device."""
        with self.database.write() as conn:
            values = {
                "job_id": assignment.job.id,
                "shard_id": assignment.shard_id,
                "no": assignment.attempt + 1,
                "device": worker.name,
                "incarnation": worker.incarnation,
                "state": AttemptState.ASSIGNED.value,
                "isolating": False,
                "assigned": 0.0,
                "rung": 0.0,
            }
            attempt_id = conn.execute(
                insert(tables.attempt).values(**values).returning(tables.attempt.c.id)
            ).scalar_one()
        started = worker.start(attempt_id)
        assert started is not None
        return started.assignment

    # -- when ----------------------------------------------------------------------------------------------------

    def assign(self) -> list[Ring]:
        with self.database.write() as conn:
            return shards.assign(conn, self.database, LEASE_S)

    def rescue(self) -> int:
        with self.database.write() as conn:
            return shards.rescue(conn, self.database, LEASE_S)

    def speculate(self) -> list[Ring]:
        with self.database.write() as conn:
            return shards.speculate(conn, self.database, LEASE_S)

    def drain(self, *workers: Worker) -> None:
        with self.database.write() as conn:
            shards.drain(conn, self.database, [worker.name for worker in workers])

    def undrain(self, *workers: Worker) -> None:
        with self.database.write() as conn:
            devices.set_drained(conn, self.database, [worker.name for worker in workers], drained=False)

    def retry(self, job: Job) -> int:
        with self.database.write() as conn:
            return reopen.retry(conn, self.database, job.id)

    def resume(self, job: Job) -> int:
        with self.database.write() as conn:
            return reopen.resume(conn, self.database, job.id)

    def distrust(self, worker: Worker, since: float) -> reopen.Reopened:
        with self.database.write() as conn:
            return reopen.distrust(conn, self.database, worker.name, since, "its user says so")

    def now(self) -> float:
        with self.database.read() as conn:
            return self.database.now(conn)

    def cancel(self, job: Job) -> bool:
        with self.database.write() as conn:
            return jobs.cancel(conn, self.database, job.id)

    def settle(self, job: Job) -> JobState:
        with self.database.write() as conn:
            return jobs.settle(conn, self.database, job.id)

    def unheard(self, ring_again_s: float = 2.0) -> list[Ring]:
        with self.database.read() as conn:
            return shards.unheard(conn, self.database, ring_again_s)

    def rang(self, rings: Sequence[Ring]) -> None:
        with self.database.write() as conn:
            shards.rang(conn, self.database, rings)

    # -- then ----------------------------------------------------------------------------------------------------

    def orphans(self) -> list[int]:
        with self.database.read() as conn:
            return shards.orphans(conn, self.database, LEASE_S)

    def has_room(self) -> bool:
        with self.database.read() as conn:
            return bool(shards.with_room(conn, self.database, LEASE_S))

    def state_of(self, job: Job) -> JobState:
        return self.again(job).state

    def again(self, job: Job) -> Job:
        """The job as it is now."""
        with self.database.read() as conn:
            return jobs.get(conn, job.id)

    def finished_but_open(self) -> list[int]:
        with self.database.read() as conn:
            return jobs.finished_but_open(conn)

    def shards(self, job: Job) -> list[str]:
        """The states of a job's shards, in order."""
        with self.database.read() as conn:
            s = tables.shard.c
            return list(conn.execute(select(s.state).where(s.job_id == job.id).order_by(s.idx)).scalars())

    def attempt(self, assignment: Assignment) -> Row[Any]:
        with self.database.read() as conn:
            return conn.execute(select(tables.attempt).where(tables.attempt.c.id == assignment.attempt_id)).one()

    def held(self, worker: Worker) -> list[int]:
        """The numbers of the shards in a device's window, first in line first."""
        with self.database.read() as conn:
            a, s = tables.attempt.c, tables.shard.c
            live = a.state.in_([state.value for state in LIVE])
            query = select(s.idx).join(tables.attempt, a.shard_id == s.id).where(a.device == worker.name, live)
            return list(conn.execute(query.order_by(a.id)).scalars())

    def rows(self, job: Job) -> list[results.Row]:
        with self.database.read() as conn:
            return list(results.rows(conn, job.id))

    def events(self, kind: str) -> list[Row[Any]]:
        with self.database.read() as conn:
            return list(conn.execute(select(tables.event).where(tables.event.c.kind == kind)))

    def everything(self) -> dict[str, list[Row[Any]]]:
        """All rows of all tables: equal twice, and nothing has changed in between."""
        with self.database.read() as conn:
            every = tables.metadata.sorted_tables
            return {table.name: list(conn.execute(select(table).order_by(*table.primary_key))) for table in every}


@dataclass(frozen=True)
class Worker:
    """One incarnation of a device; kept beyond its end, it is a zombie."""

    fleet: Fleet
    name: str
    incarnation: int

    @property
    def database(self) -> Database:
        return self.fleet.database

    def start(self, attempt_id: int, *, again: bool = False) -> Started | None:
        with self.database.write() as conn:
            return shards.start(conn, self.database, attempt_id, self.name, self.incarnation, again=again)

    def take(self) -> Assignment:
        """Fill this device's window and start what comes first."""
        taken = self.try_to_take()
        assert taken is not None, f"nothing to do for {self.name}"
        return taken

    def try_to_take(self) -> Assignment | None:
        with self.database.write() as conn:
            shards.assign(conn, self.database, LEASE_S, only=[self.name])
            a = tables.attempt.c
            mine = (a.device == self.name, a.incarnation == self.incarnation, a.state == AttemptState.ASSIGNED.value)
            first = conn.scalar(select(a.id).where(*mine).order_by(a.id).limit(1))
            started = first and shards.start(conn, self.database, first, self.name, self.incarnation)
        return started.assignment if started else None

    def complete(
        self,
        assignment: Assignment,
        samples: Sequence[SampleResult] | None = None,
        canary: Canary | None = None,
    ) -> list[Ring] | None:
        result = replace(result_of(samples_of(assignment) if samples is None else samples), canary=canary)
        return shards.complete(self.database, assignment, self.name, self.incarnation, result, LEASE_S)

    def finish(self) -> int:
        """Complete whatever there is for this device; the answer is how many shards that were."""
        done = 0
        while (assignment := self.try_to_take()) is not None:
            assert self.complete(assignment) is not None
            done += 1
        return done

    def fail(self, assignment: Assignment, failure: Failure = Failure.DEVICE, reason: str = "broke") -> list[Ring]:
        with self.database.write() as conn:
            return shards.fail(conn, self.database, assignment, self.name, failure, reason, LEASE_S)

    def decline(self, assignment: Assignment, reason: str = "no bins") -> list[Ring]:
        with self.database.write() as conn:
            return shards.decline(conn, self.database, assignment, self.name, reason, LEASE_S)

    def answer(self, digest: str, *, number: int = 0, artifact: str = "a", far: float | None = None) -> Verdict:
        """Say something to a canary."""
        said = canary_of(digest, number=number, artifact=artifact, far=far)
        with self.database.write() as conn:
            return shards.answer(conn, self.database, self.name, self.incarnation, said)

    def hand_back(self) -> int:
        with self.database.write() as conn:
            return shards.hand_back(conn, self.database, self.name, self.incarnation)

    def beat(self) -> frozenset[int] | None:
        with self.database.write() as conn:
            return devices.beat(conn, self.database, self.name, self.incarnation)

    def leave(self) -> bool:
        with self.database.write() as conn:
            return devices.leave(conn, self.database, self.name, self.incarnation)

    @property
    def device(self) -> devices.Device:
        """The device as it is now."""
        with self.database.read() as conn:
            found = devices.get(conn, self.name)
        assert found is not None
        return found
