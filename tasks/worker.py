"""
A device's worker: one Celery worker (threads pool, concurrency 1) beside one device process.

    python -m tasks.worker localhost:0

It locks its device, registers a new incarnation, beats, answers its queue, and on SIGTERM finishes its shard, hands
back what waits and leaves.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

import psutil
from celery.signals import worker_ready

from db import devices, jobs, shards
from db.devices import Registration
from db.engine import Database, open_database
from db.shards import Started
from farm import artifacts
from farm.data import manifest
from farm.data.manifest import Manifest
from farm.errors import (
    DataError,
    DeviceCrashed,
    DeviceError,
    DeviceHung,
    FarmError,
    InvariantBroken,
    JobError,
    StorageError,
)
from farm.jobs import Assignment, Failure, JobSpec, ShardResult
from farm.settings import Settings, load_settings
from farm.versions import versions
from tasks.app import make_app, queue_of, worker_name
from tasks.dispatch import ring
from workers import broker
from workers.backends.base import Load, TensorSpec
from workers.devices import LocalDevice, cpu_model, discover, find, lock
from workers.pipeline import Aborted, NonFinite, Pipeline, Plan

log = logging.getLogger(__name__)

_current: DeviceWorker | None = None


def current() -> DeviceWorker:
    """The worker of this process; `RuntimeError` anywhere else."""
    if _current is None:
        raise RuntimeError("no device worker in this process")
    return _current


class DeviceWorker:
    """What a doorbell wakes. `evaluate` runs in the pool's one thread, `_beat` in one of its own."""

    def __init__(self, settings: Settings, database: Database, device: LocalDevice) -> None:
        self.device = device
        self._settings = settings
        self._database = database
        self._pipeline = Pipeline(settings.deadline_s, threads=_spare_cores(settings))
        self._data: Mapping[str, Manifest] = {}
        self._checked: set[tuple[str, float]] = set()
        self._app = make_app(broker.url(settings))
        self._stopping = threading.Event()
        self._busy = threading.Lock()
        self._pipeline.device.ensure()  # imports its libraries while we register and connect
        registration = self._registration()
        with database.write() as conn:
            shards.abandon(conn, database, device.name)
            self.incarnation = devices.register(conn, database, registration)
            rings = shards.assign(conn, database, settings.lease_s)
        self._first_rings = rings
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()
        signal.signal(signal.SIGTERM, self._on_early_term)

    def serve(self) -> None:
        """Ring for what was assigned at once, read it ahead, and consume the queue until SIGTERM."""
        threading.Thread(target=ring, args=(self._app, self._first_rings), daemon=True).start()
        for mine in (r.assignment for r in self._first_rings if r.device == self.device.name):
            self._read_ahead(mine)
        worker = self._app.Worker(
            hostname=worker_name(self.device.name),
            queues=[queue_of(self.device.name)],
            pool="threads",
            concurrency=1,
            without_gossip=True,
            without_mingle=True,
            task_events=True,
            loglevel="WARNING",
            quiet=True,
        )
        worker_ready.connect(self._on_ready, weak=False)
        worker.start()

    def _on_ready(self, **_: object) -> None:
        """Celery's warm shutdown takes a second even when idle: leave by a shorter way then."""
        celerys: Any = signal.getsignal(signal.SIGTERM)

        def on_term(number: int, frame: FrameType | None) -> None:
            if self._busy.locked():
                celerys(number, frame)
            else:
                threading.Thread(target=self._leave).start()

        signal.signal(signal.SIGTERM, on_term)

    def _leave(self) -> None:
        with self._busy:  # from here on `evaluate` waits for an end that is near
            try:
                self.close()
            finally:
                os._exit(0)

    def _on_early_term(self, *_: object) -> None:
        threading.Thread(target=self._leave).start()

    def close(self) -> None:
        """Leave in good order: nothing is live afterwards that this worker holds."""
        self._stopping.set()
        try:
            with self._database.write() as conn:  # first, for a hanging device takes longer to leave than we may have
                shards.hand_back(conn, self._database, self.device.name, self.incarnation)
                devices.leave(conn, self._database, self.device.name, self.incarnation)
        finally:
            self._pipeline.close()

    def evaluate(self, attempt_id: int) -> str:
        """One attempt from doorbell to commit; the answer is a word for the log."""
        with self._busy:
            return self._evaluate(attempt_id)

    def _evaluate(self, attempt_id: int) -> str:
        name = self.device.name
        with self._database.write() as conn:
            started = shards.start(conn, self._database, attempt_id, name, self.incarnation)
        if started is None:
            return "stale"
        assignment = started.assignment
        try:
            return self._attempt(started)
        except Exception as exc:
            log.exception("%s broke", assignment.task_id)
            error = exc if isinstance(exc, FarmError) else DeviceError(f"internal error: {exc!r}")
        try:
            return self._failed(assignment, error)
        except StorageError:
            log.exception("cannot even say so; leaving, so that a new incarnation takes over")
            os._exit(1)

    def _attempt(self, started: Started) -> str:
        assignment = started.assignment
        try:
            plan = self._plan(assignment)
            self._pipeline.read_ahead(plan)
            if started.waiting is not None:
                self._read_ahead(started.waiting)
            result = self._pipeline.run(plan)
        except Aborted:
            return "aborted"
        except (DataError, DeviceError, JobError) as exc:
            return self._failed(assignment, exc)
        return self._complete(assignment, result)

    def _complete(self, assignment: Assignment, result: ShardResult) -> str:
        """Commit, retrying a database that is busy or away until the lease is over."""
        deadline = time.monotonic() + self._settings.lease_s
        while True:
            try:
                rings = shards.complete(
                    self._database, assignment, self.device.name, self.incarnation, result, self._settings.lease_s
                )
                break
            except StorageError as exc:
                if isinstance(exc, InvariantBroken) or time.monotonic() > deadline:
                    raise
                log.warning("could not commit %s, trying again: %s", assignment.task_id, exc)
                time.sleep(0.5)
        if rings is None:
            return "fenced"
        ring(self._app, rings)
        if not rings:
            self._settle(assignment.job.id)
        return "won"

    def _settle(self, job_id: int) -> None:
        """Whoever commits a job's last shard ends the job; the coordinator would do it a tick later."""
        with self._database.read() as conn:
            finished = job_id in jobs.finished_but_open(conn)
        if finished:
            with self._database.write() as conn:
                jobs.settle(conn, self._database, job_id)

    def _failed(self, assignment: Assignment, error: FarmError) -> str:
        failure = _kind(error)
        log.warning("%s failed: %s", assignment.task_id, error)
        with self._database.write() as conn:
            rings = shards.fail(
                conn, self._database, assignment, self.device.name, failure, str(error), self._settings.lease_s
            )
        ring(self._app, rings)
        return f"failed ({failure.value})"

    def _read_ahead(self, assignment: Assignment) -> None:
        try:
            self._pipeline.read_ahead(self._plan(assignment))
        except FarmError as exc:  # its own attempt will say so when its bell rings
            log.info("cannot read ahead for %s: %s", assignment.task_id, exc)

    def _plan(self, assignment: Assignment) -> Plan:
        spec = assignment.job.spec
        data_dir = self._settings.data_dir
        samples = self._manifest(spec).samples[assignment.start : assignment.stop]
        return Plan(
            attempt_id=assignment.attempt_id,
            load=self._load(spec),
            dataset=spec.dataset,
            directory=manifest.bins_dir(data_dir, spec.recipe, spec.dtype),
            samples=samples,
            isolating=assignment.isolating,
            non_finite_before=assignment.non_finite_before,
        )

    def _load(self, spec: JobSpec) -> Load:
        artifact = spec.artifact
        path = ""
        if artifact.file:
            file = artifacts.directory(self._settings.data_dir, spec.model) / artifact.file
            path = str(file)
            try:
                key = (artifact.sha256, file.stat().st_mtime)
                if key not in self._checked and artifacts.sha256_of(file) != artifact.sha256:
                    raise JobError(f"{file} is not the artifact the job froze (sha256 {artifact.sha256[:12]})")
            except OSError as exc:
                raise JobError(f"cannot read the artifact {file}: {exc.strerror}") from exc
            self._checked.add(key)
        return Load(
            backend=artifact.backend,
            path=path,
            input=TensorSpec(**artifact.input.model_dump()),
            output=TensorSpec(**artifact.output.model_dump()),
            device=self.device.name,
            options={"simulated": self._settings.simulated} if artifact.backend == "simulated" else {},
        )

    def _manifest(self, spec: JobSpec) -> Manifest:
        """The manifest a job froze; kept, for all shards of a job need it. `JobError` if it is another one now."""
        if spec.manifest_digest not in self._data:
            directory = manifest.bins_dir(self._settings.data_dir, spec.recipe, spec.dtype)
            try:
                found = manifest.read(directory)
            except FarmError as exc:
                raise JobError(str(exc)) from exc
            if found.digest != spec.manifest_digest:
                raise JobError(
                    f"{directory / manifest.FILE_NAME} changed since the job was submitted (digest "
                    f"{found.digest[:12]}, the job froze {spec.manifest_digest[:12]}): submit a new job"
                )
            self._data = {found.digest: found}
        return self._data[spec.manifest_digest]

    def _beat(self) -> None:
        """Say that we live, and drop what was taken from us. A newer incarnation means that we have to go."""
        while not self._stopping.wait(self._settings.heartbeat_s):
            under_way = self._pipeline.attempts()  # before the rows are read: younger ones may not be in them yet
            try:
                with self._database.write() as conn:
                    live = devices.beat(conn, self._database, self.device.name, self.incarnation)
            except StorageError as exc:
                log.warning("no heartbeat: %s", exc)
                continue
            if live is None:
                log.error("%s was registered by another worker; leaving", self.device.name)
                os._exit(1)
            self._pipeline.drop(under_way - live)

    def _registration(self) -> Registration:
        me = psutil.Process()
        return Registration(
            name=self.device.name,
            host=self.device.host,
            index=self.device.index,
            soc=self.device.soc,
            backends=self.device.backends,
            pid=me.pid,
            pid_started=me.create_time(),
            info={"cpu": cpu_model(), "versions": versions()},
        )


def _spare_cores(settings: Settings) -> int:
    """Threads that post-processing may use: a device's share of the host's cores."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, len(discover(settings))))


def _kind(error: FarmError) -> Failure:
    kinds: Mapping[type[FarmError], Failure] = {
        DeviceCrashed: Failure.CRASH,
        DeviceHung: Failure.HANG,
        NonFinite: Failure.NON_FINITE,
        DataError: Failure.DATA,
        JobError: Failure.JOB,
        InvariantBroken: Failure.JOB,
    }
    return kinds.get(type(error), Failure.DEVICE)


def main(arguments: list[str]) -> int:
    global _current
    settings = load_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        device = find(settings, arguments[0])
        held: Any = lock(device, settings.run_dir)
        _current = DeviceWorker(settings, open_database(settings), device)
    except FarmError as exc:
        log.error("%s", exc)
        return exc.exit_code
    try:
        _current.serve()
    finally:
        _current.close()
        held.close()
    return 0


if __name__ == "__main__":
    from tasks import worker  # the task must find the same module, not a second copy named __main__

    sys.exit(worker.main(sys.argv[1:]))
