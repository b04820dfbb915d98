"""
A device's worker: one Celery worker (threads pool, concurrency 1) beside one device process.

    python -m tasks.worker localhost:0 [PEERS DEVICE]

Of an NPU its supervisor says what it knows already: how many devices the host serves, and the device as JSON.

It locks its device, registers a new incarnation, beats, answers its queue, and on SIGTERM finishes its shard, hands
back what waits and leaves.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil
from celery.signals import worker_ready

from db import devices, jobs, results, shards
from db.devices import Registration
from db.engine import Database, open_database
from db.shards import Ring, Started
from farm import artifacts, canary, logits
from farm.data import manifest
from farm.data.manifest import Frozen, Sample
from farm.errors import (
    DataError,
    DeviceCrashed,
    DeviceError,
    DeviceHung,
    FarmError,
    HostError,
    InvariantBroken,
    JobError,
    StorageError,
)
from farm.jobs import Assignment, Canary, DeviceState, Failure, Job, JobSpec, ShardResult, Verdict
from farm.settings import Settings, load_settings
from farm.versions import versions
from tasks.app import make_app, queue_of, worker_name
from tasks.dispatch import ring
from workers import backends, broker
from workers.backends.base import Load, TensorSpec
from workers.canary import samples as samples_of_noise
from workers.devices import LocalDevice, cpu_model, find, kind_of, lock, machine_id, serving
from workers.pipeline import Aborted, NonFinite, Pipeline, Plan
from workers.ring import nbytes as ring_bytes

T = TypeVar("T")

#: Share of a host's memory that its devices' buffers may take.
MOST_MEMORY = 0.75
#: Heartbeats of ours to one of Celery's, which only Flower reads.
FLOWERS_TURN = 2.5
#: Batches before those that are timed, for the first ones allocate and compile.
WARM_UP = 1

log = logging.getLogger(__name__)

_current: DeviceWorker | None = None


def current() -> DeviceWorker:
    """The worker of this process; `RuntimeError` anywhere else."""
    if _current is None:
        raise RuntimeError("no device worker in this process")
    return _current


class DeviceWorker:
    """What a doorbell wakes. `evaluate` runs in the pool's one thread, `_beat` in one of its own."""

    def __init__(self, settings: Settings, database: Database, device: LocalDevice, peers: int) -> None:
        """`peers` is how many devices this host serves, this one among them."""
        self.device = device
        self._settings = settings
        self._database = database
        self._peers = peers
        # Post-processing may use a device's share of the host's cores.
        threads = max(1, len(os.sched_getaffinity(0)) // max(1, peers))
        self._pipeline = Pipeline(settings.deadline_s, device.backends[0], threads=threads)
        self._data: Mapping[str, Frozen] = {}  #: the manifest used last, by its digest
        self._checked: set[tuple[str, float]] = set()
        self._unfit: dict[int, Assignment] = {}  #: by job, what this host could not do
        self._again: set[int] = set()  #: of these jobs those that were given a second chance
        self._ahead: Plan | None = None  #: the one begun last before its bell rang
        self._asked: JobSpec | None = None  #: whose model the last canary was for
        self._app = make_app(broker.url(settings))
        self._stopping = threading.Event()
        self._busy = threading.Lock()
        self._pipeline.device.ensure()  # imports its libraries while we register and connect
        registration = self._registration()
        with database.write() as conn:
            shards.abandon(conn, database, device.name)
            self.incarnation = devices.register(conn, database, registration, settings.lease_s)
            rings = shards.assign(conn, database, settings.lease_s)
        self._first_rings = rings
        for work, name in ((self._beat, "heartbeat"), (self._probe, "probe")):
            threading.Thread(target=work, name=name, daemon=True).start()
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
            heartbeat_interval=FLOWERS_TURN * self._settings.heartbeat_s,
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
        try:
            started = self._start(attempt_id)
            if started is None:
                return "stale"
            try:
                return self._attempt(started)
            except StorageError as exc:
                if not isinstance(exc, InvariantBroken):
                    raise
                error: FarmError = exc
            except Exception as exc:
                log.exception("%s broke", started.assignment.task_id)
                error = exc if isinstance(exc, FarmError) else DeviceError(f"internal error: {exc!r}")
            return self._failed(started.assignment, error)
        except StorageError:  # no fault of the device's, and what became of the attempt is not known
            log.exception("the database was away for a lease; leaving, so that a new incarnation takes over")
            os._exit(1)

    def _attempt(self, started: Started) -> str:
        assignment = started.assignment
        try:
            plan = self._planned(assignment)
            waiting = started.waiting
            self._begin(plan, assignment.job.spec, last=waiting is None or waiting.job.id != assignment.job.id)
            if waiting is not None:
                self._read_ahead(waiting)
            result = self._pipeline.run(plan)
            result = replace(result, canary=self._answer())
        except Aborted:
            return "aborted"
        except HostError as exc:
            return self._declined(assignment, exc)
        except (DataError, DeviceError, JobError) as exc:
            return self._failed(assignment, exc)
        if result.unread and self._others_can(assignment):
            return self._failed(assignment, HostError(result.unread))
        return self._complete(assignment, result)

    def _begin(self, plan: Plan, spec: JobSpec, *, last: bool = False) -> None:
        """
        Have a shard follow what is under way, and a canary follow it when one is due.

        The `last` shard of a job always has one: else what a device did since the one before would go unseen.
        """
        self._pipeline.read_ahead(plan)
        again = last and not spec.loop and not self._pipeline.is_asked()
        number = 0 if again else self._pipeline.canary_due(plan.load)
        if number is not None and not plan.isolating:
            self._pipeline.ask(plan.load, number)
            self._asked = spec

    def _answer(self) -> Canary | None:
        """What the device said to the canary it was asked, if it was."""
        try:
            answer = self._pipeline.answer()
        except Aborted:
            raise
        except FarmError as exc:
            raise DeviceError(f"it fails at a canary: {exc}") from exc
        if answer is None or self._asked is None:
            return None
        (number, said, ms), artifact = answer, self._asked.artifact
        return Canary(
            artifact_sha256=artifact.sha256,
            number=number,
            digest=said.digest,
            max_abs_diff=said.max_abs_diff,
            tolerance=canary.TOLERANCE.get(artifact.backend, 0.0),
            ms=ms,
        )

    def _others_can(self, assignment: Assignment) -> bool:
        """Whether another host is left that has not failed at this shard, and might have its bins."""
        with self._database.read() as conn:
            hosts = shards.hosts_left(conn, self._database, assignment.job, self._settings.lease_s)
            tried = shards.hosts_tried(conn, assignment)
        return bool(hosts - tried - {self.device.host})

    def _start(self, attempt_id: int) -> Started | None:
        tries = 0

        def start() -> Started | None:
            nonlocal tries
            tries += 1
            with self._database.write() as conn:  # a commit of which nothing was heard may have been one
                return shards.start(
                    conn, self._database, attempt_id, self.device.name, self.incarnation, again=tries > 1
                )

        return self._persist(f"start attempt {attempt_id}", start)

    def _complete(self, assignment: Assignment, result: ShardResult) -> str:
        rings = self._persist(
            f"commit {assignment.task_id}",
            lambda: shards.complete(
                self._database, assignment, self.device.name, self.incarnation, result, self._settings.lease_s
            ),
        )
        if rings is None:
            self._tidy(assignment.job)
            return "fenced"
        ring(self._app, rings)
        if not rings:
            with suppress(StorageError):  # the coordinator will do it
                self._settle(assignment.job.id)
            self._tidy(assignment.job)
        return "won"

    def _persist(self, what: str, verb: Callable[[], T]) -> T:
        """Do it, again and again while the database is busy or away, until the lease is over."""
        deadline = time.monotonic() + self._settings.lease_s
        while True:
            try:
                return verb()
            except StorageError as exc:
                if isinstance(exc, InvariantBroken) or time.monotonic() > deadline:
                    raise
                log.warning("could not %s, trying again: %s", what, exc)
                time.sleep(0.5)

    def _settle(self, job_id: int) -> None:
        """Whoever commits a job's last shard ends the job; the coordinator would do it a tick later."""
        with self._database.read() as conn:
            finished = job_id in jobs.finished_but_open(conn)
        if finished:
            with self._database.write() as conn:
                jobs.settle(conn, self._database, job_id)

    def _tidy(self, job: Job) -> None:
        """
        Remove the raw outputs on this host that count nowhere, by what the database says: an attempt that looks fenced
        may have won with a commit of which nothing was heard. Where this fails, whoever reads the job's files does it.
        """
        if job.spec.keep_logits:
            with suppress(StorageError), self._database.read() as conn:
                logits.tidy(logits.directory(self._settings.data_dir, job), partial(results.useless, conn))

    def _logits_path(self, assignment: Assignment) -> Path:
        directory = logits.directory(self._settings.data_dir, assignment.job)
        return directory / logits.file_name(assignment.shard, assignment.attempt_id)

    def _failed(self, assignment: Assignment, error: FarmError) -> str:
        failure = _kind(error)
        log.warning("%s failed: %s", assignment.task_id, error)

        def fail() -> list[Ring]:
            with self._database.write() as conn:
                return shards.fail(
                    conn, self._database, assignment, self.device.name, failure, _text(error), self._settings.lease_s
                )

        ring(self._app, self._persist(f"say that {assignment.task_id} failed", fail))
        self._tidy(assignment.job)
        return f"failed ({failure.value})"

    def _declined(self, assignment: Assignment, error: HostError) -> str:
        log.warning("%s cannot be done here: %s", assignment.task_id, error)
        if assignment.job.id not in self._again or self._lacks(assignment):  # else it would go on like that
            self._unfit[assignment.job.id] = assignment

        def decline() -> list[Ring]:
            with self._database.write() as conn:
                return shards.decline(
                    conn, self._database, assignment, self.device.name, _text(error), self._settings.lease_s
                )

        ring(self._app, self._persist(f"decline {assignment.task_id}", decline))
        return "declined"

    def _read_ahead(self, assignment: Assignment) -> None:
        try:
            self._ahead = self._plan(assignment)
            self._begin(self._ahead, assignment.job.spec)
        except FarmError as exc:  # its own attempt will say so when its bell rings
            log.info("cannot read ahead for %s: %s", assignment.task_id, exc)

    def _planned(self, assignment: Assignment) -> Plan:
        """The plan that was made when it was read ahead, or one made now; its artifact is looked at in any case."""
        ahead = self._ahead
        if ahead is None or ahead.attempt_id != assignment.attempt_id:
            return self._plan(assignment)
        self._load(assignment.job.spec)
        return ahead

    def _plan(self, assignment: Assignment) -> Plan:
        spec = assignment.job.spec
        if spec.loop:
            load = self._load(spec)
            batches = samples_of_noise(spec.bs * (WARM_UP + spec.loop))
            return Plan(
                attempt_id=assignment.attempt_id,
                load=load,
                dataset=spec.dataset,
                directory=Path(),
                samples=batches,
                loop=spec.loop,
            )
        data_dir = self._settings.data_dir
        samples = self._samples(spec, assignment.start, assignment.stop)
        if spec.keep_logits:
            outputs = sum(sample.parts for sample in samples)
            logits.check_room(data_dir, outputs * spec.artifact.output.nbytes // spec.bs)
        return Plan(
            attempt_id=assignment.attempt_id,
            load=self._load(spec),
            dataset=spec.dataset,
            directory=manifest.bins_dir(data_dir, spec.recipe, spec.dtype),
            samples=samples,
            isolating=assignment.isolating,
            non_finite_before=assignment.non_finite_before,
            logits=self._logits_path(assignment) if spec.keep_logits else None,
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
                    raise HostError(f"{file} is not the artifact the job froze (sha256 {artifact.sha256[:12]})")
            except OSError as exc:
                raise HostError(f"cannot read the artifact {file}: {exc.strerror}") from exc
            self._checked.add(key)
        self._check_memory(spec)
        return Load(
            backend=artifact.backend,
            path=path,
            input=TensorSpec(**artifact.input.model_dump()),
            output=TensorSpec(**artifact.output.model_dump()),
            device=self.device.name,
            options=self._simulation(spec.model) if artifact.backend == "simulated" else {},
        )

    def _check_memory(self, spec: JobSpec) -> None:
        """`HostError` where the devices' buffers together would leave the host none: the kernel would kill somebody."""
        chosen = spec.together or spec.devices
        count = len([name for name in chosen if name.rpartition(":")[0] == self.device.host]) if chosen else self._peers
        needed = count * ring_bytes(spec.artifact.input.nbytes, spec.artifact.output.nbytes)
        total = psutil.virtual_memory().total
        if needed > MOST_MEMORY * total:
            raise HostError(
                f"{count} devices of {self.device.host} need {needed / 1e9:.1f} GB of buffers for {spec.model} at "
                f"batch size {spec.bs}, and it has {total / 1e9:.1f} GB of memory: take a smaller batch size or head, "
                "or fewer devices (--devices)"
            )

    def _simulation(self, model: str) -> dict[str, str]:
        _, _, chip = self.device.soc.partition("simulated ")
        return {"simulated": self._settings.simulated, "model": model, "chip": chip}

    def _samples(self, spec: JobSpec, start: int, stop: int) -> list[Sample]:
        """Some of the samples of the manifest that a job froze. `HostError` if there is none here, or another."""
        frozen = self._data.get(spec.manifest_digest)  # the probe's thread comes here, too
        if frozen is None:
            directory = manifest.bins_dir(self._settings.data_dir, spec.recipe, spec.dtype)
            try:
                frozen = manifest.frozen(directory, spec.manifest_digest)
                if frozen is None:
                    found = manifest.read(directory).digest
                    raise HostError(
                        f"{directory / manifest.FILE_NAME} is not the one the job froze (digest {found[:12]}, "
                        f"expected {spec.manifest_digest[:12]}): copy that one here, or submit a new job"
                    )
            except DataError as exc:
                raise HostError(str(exc)) from exc
            self._data = {spec.manifest_digest: frozen}
        return frozen.samples(start, stop)

    def _beat(self) -> None:
        """
        Say that we live, drop what was taken from us and tell how the device broke at it. A newer incarnation means
        that we have to go.

        What we should do and nobody rings for, with the broker away perhaps, is begun from here.
        """
        unheard: frozenset[int] = frozenset()
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
            for attempt_id, error in self._pipeline.late():
                with suppress(StorageError), self._database.write() as conn:  # a strike less
                    shards.fail_late(conn, self._database, attempt_id, self.device.name, _kind(error), _text(error))
            waiting = live if not self._busy.locked() else frozenset[int]()
            if waiting and waiting == unheard:
                threading.Thread(target=self.evaluate, args=(min(waiting),), daemon=True).start()
            unheard = waiting

    def _probe(self) -> None:
        """See whether a device in quarantine is sound again, and whether this host has what it lacked."""
        wait_s = 0.0
        while not self._stopping.wait(wait_s):
            wait_s = self._settings.probe_s
            try:
                self._look_for_what_lacked()
                with self._database.read() as conn:
                    me = devices.get(conn, self.device.name)
                if me is not None and me.state is DeviceState.QUARANTINED and self._busy.acquire(blocking=False):
                    try:
                        self._ask_in_quarantine()
                    finally:
                        self._busy.release()
                    wait_s *= 2 ** min(me.quarantines, 6)
            except FarmError as exc:
                log.warning("%s", exc)
            except Exception:
                log.exception("the probe failed; it goes on")

    def _look_for_what_lacked(self) -> None:
        for job_id, assignment in list(self._unfit.items()):
            if self._lacks(assignment):
                continue
            with self._database.write() as conn:
                jobs.fit_again(conn, self._database, job_id, self.device.host)
            self._unfit.pop(job_id)
            self._again.add(job_id)

    def _lacks(self, assignment: Assignment) -> bool:
        """Whether this host visibly lacks what a job needs."""
        try:
            backends.check_host(self._plan(assignment).load)
        except FarmError:
            return True
        return False

    def _ask_in_quarantine(self) -> None:
        """A canary of what the device worked on last: if it answers, and is not wrong, it takes work again."""
        with self._database.read() as conn:
            job = shards.last_job(conn, self.device.name)
        if job is None:
            return
        self._pipeline.ask(self._load(job.spec), 0)
        self._asked = job.spec
        answer = self._answer()
        if answer is None:
            return
        with self._database.write() as conn:
            verdict = shards.answer(conn, self._database, self.device.name, self.incarnation, answer)
            if verdict in (Verdict.AGREES, Verdict.UNVERIFIED):
                text = f"it answered a canary ({verdict.value})"
                devices.release(conn, self._database, self.device.name, devices.STRIKES - 1, text)

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
            kind=kind_of(self.device),
            info={
                "cpu": cpu_model(),
                "versions": versions(),
                "machine": machine_id(),
                **self.device.info,
                # It serves, so what is said against it was overruled.
                **({"forced": self.device.unusable, "at_start": self.device.info} if self.device.place else {}),
            },
        )


def _text(error: FarmError) -> str:
    """A sentence that any database takes, whatever a driver put into it."""
    return str(error).replace("\0", "").encode("utf-8", "replace").decode()


def _kind(error: FarmError) -> Failure:
    kinds: Mapping[type[FarmError], Failure] = {
        DeviceCrashed: Failure.CRASH,
        DeviceHung: Failure.HANG,
        NonFinite: Failure.NON_FINITE,
        DataError: Failure.DATA,
        HostError: Failure.HOST,
        JobError: Failure.JOB,
        InvariantBroken: Failure.JOB,
    }
    return kinds.get(type(error), Failure.DEVICE)


def _device(settings: Settings, arguments: Sequence[str]) -> tuple[LocalDevice, int]:
    """Which device to serve, and how many this host does; an NPU's worker need not ask for the others."""
    name, *told = arguments
    if told:
        return LocalDevice(**json.loads(told[1])), int(told[0])
    return find(settings, name), len(serving(settings))


def main(arguments: list[str]) -> int:
    global _current
    settings = load_settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        device, peers = _device(settings, arguments)
        held: Any = lock(device, settings.run_dir)
        _current = DeviceWorker(settings, open_database(settings), device, peers)
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
