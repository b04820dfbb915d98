"""
Reader, device and post-processing at once, over one ring.

Three threads pass groups of batches on: the reader fills input buffers, the device thread keeps two groups at the
device process, post-processing turns outputs into rows. A thread that wakes up costs more than what it then does with
a small batch, so batches of small outputs go in groups of about a third of a second, which the device process
answers as one, and the device thread itself turns such outputs into rows.

`run` evaluates one shard; `read_ahead` lets the next shard's batches follow without a gap while the first is being
committed. A batch that breaks the device process breaks its own shard only: the others' batches are sent again to the
next process.
"""

from __future__ import annotations

import logging
import os
import statistics
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np

from farm import canary, sharding
from farm.data.manifest import Sample
from farm.errors import DataError, DeviceCrashed, DeviceError, DeviceHung, FarmError, HostError
from farm.jobs import Budget, ResultState, SampleResult, ShardResult
from farm.logits import Writer
from workers.backends.base import Load, Times
from workers.canary import EVERY, Deaf, Listener, samples
from workers.device import DeviceProcess, schedule
from workers.postprocess import Reducer, Slot, reducer_of
from workers.reader import read_bin
from workers.ring import SMALL, Buffer, Ring

#: Groups at the device process: one running, one waiting.
DEPTH = 2
#: Device time of a group: long beside a wake-up, short beside a shard, a lease and what a closing worker has.
GROUP_MS = 320.0
#: The reader is not woken to fill less than so many buffers, if there is more to be read.
AT_ONCE = 2
#: A batch may take so many times the usual, and never less than the configured deadline.
PATIENCE = 20.0
#: The first batch after a load may compile, allocate and warm up.
FIRST_PATIENCE = 4.0
#: How long a closing pipeline lets the device finish the batches it has.
CLOSE_S = 3.0

log = logging.getLogger(__name__)


class NonFinite(DeviceError):
    """Scores that are no numbers: to be seen on another device before the sample is blamed."""


class Aborted(FarmError):
    """The attempt is not live any more; its work was dropped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One attempt, as the pipeline needs it."""

    attempt_id: int
    load: Load
    dataset: str
    directory: Path  #: of the bins
    samples: Sequence[Sample]
    isolating: bool = False
    non_finite_before: bool = False
    canary: int | None = None  #: which one this is, and no attempt
    loop: int = 0  #: batches of noise to be timed; what they come to is nobody's business
    logits: Path | None = None  #: file that keeps the raw outputs

    @property
    def bs(self) -> int:
        return self.load.input.shape[0]


@dataclass(eq=False)
class _Run:
    """A plan under way."""

    plan: Plan
    reducer: Reducer
    logits: Writer | None
    is_small: bool  #: the device thread may turn its outputs into rows while the device does the next batches
    rows: dict[str, SampleResult] = field(default_factory=dict)
    batch_ms: list[Times] = field(default_factory=list)
    read_ms: float = 0.0
    wait_ms: float = 0.0
    post_ms: float = 0.0
    load_ms: float = 0.0
    failed: set[str] = field(default_factory=set)
    open_batches: int = 0
    unusable: int = 0  #: samples that never reached the device
    unread: str = ""  #: why one of them did not, although it was prepared
    broke: dict[str, str] = field(default_factory=dict)  #: how samples broke the device, while isolating
    holding: list[_Batch] = field(default_factory=list)  #: batches of which the reducer holds outputs
    claimed: bool = False  #: somebody waits for it; else it is only read ahead
    error: FarmError | None = None
    ended: threading.Event = field(default_factory=threading.Event)

    def fail_sample(self, sample: Sample, reason: str) -> None:
        self.failed.add(sample.name)
        self.rows[sample.name] = SampleResult(
            name=sample.name, state=ResultState.FAILED, label=sample.label, reason=reason
        )

    def result(self) -> ShardResult:
        device_ms = sum(sum(times) for times in self.batch_ms)
        loop = self.plan.loop
        return ShardResult(
            samples=[] if loop else [self.rows[sample.name] for sample in self.plan.samples],
            batch_ms=self.batch_ms[-loop:],  # all of them, where nothing is looped
            budget=Budget(
                read_ms=self.read_ms,
                wait_ms=self.wait_ms,
                device_ms=device_ms,
                post_ms=self.post_ms,
                load_ms=self.load_ms,
            ),
            unread=self.unread,
        )


@dataclass(eq=False)
class _Batch:
    """Slots at fixed places of a batch; places that are not `active` hold padding."""

    run: _Run
    slots: Sequence[Slot]
    active: list[int]
    given: Buffer | None = None
    wanted: Buffer | None = None
    ready_at: float = 0.0

    def names(self) -> str:
        """The samples in it, for a sentence."""
        if self.run.plan.loop:
            return "noise"
        return ", ".join(dict.fromkeys(self.slots[place].sample.name for place in self.active))


#: Batches of one run that go to the device together.
_Group = Sequence[_Batch]


class Pipeline:
    """The threads and the ring of one device. `run` and `read_ahead` are for one caller thread."""

    def __init__(self, deadline_s: float, *backends: str, threads: int = 1) -> None:
        """`backends` are those most likely needed, `threads` is how many post-processing may use."""
        self.device = DeviceProcess(*backends)
        self._deadline_s = deadline_s
        self._threads_for_post = threads
        self._lock = threading.Lock()
        self._to_read, self._to_drive, self._to_post = (threading.Condition(self._lock) for _ in range(3))
        # All below is guarded by `_lock`.
        self._load: Load | None = None
        self._ring: Ring | None = None
        self._runs: dict[int, _Run] = {}
        self._late: list[tuple[int, FarmError]] = []
        self._todo: deque[_Batch] = deque()
        self._ready: deque[_Group] = deque()
        self._sent: deque[_Group] = deque()
        self._done: deque[_Group] = deque()
        self._free_in: list[Buffer] = []
        self._free_out: list[Buffer] = []
        self._in_hand = 0  #: groups that a thread works on outside the lock
        self._recent_ms: deque[float] = deque(maxlen=32)
        self._usual_ms = 0.0  #: their median
        self._answered = 0  #: batches that this device process has answered
        self._since = 0.0  #: when the device got the group it works on
        self._asked = 0  #: canaries
        self._question: _Run | None = None  #: the last of them, until its answer is taken
        self._since_canary: int | None = None  #: batches; None before the first of a loaded model
        self._closing = False
        self._threads = [
            threading.Thread(target=self._guard, args=(work,), name=name, daemon=True)
            for name, work in (("reader", self._read), ("device", self._drive), ("post", self._post))
        ]
        for thread in self._threads:
            thread.start()

    def run(self, plan: Plan) -> ShardResult:
        """
        Evaluate a shard; every sample of it is in the result, scored or failed.

        Raises `DeviceHung`, `DeviceCrashed`, `NonFinite` or another `DeviceError`, `DataError` for a batch that the
        backend blames, `HostError`, `JobError`, or `Aborted`.
        """
        with self._lock:
            run = self._begin(plan)
            run.claimed = True
        try:
            run.ended.wait()
        finally:
            with self._lock:
                self._runs.pop(plan.attempt_id, None)
        if run.error is not None:
            raise run.error
        if len(run.broke) == len(plan.samples) - run.unusable > 1:
            if run.logits:
                run.logits.discard()
            raise DeviceCrashed(f"every sample breaks the device process: {next(iter(run.broke.values()))}")
        if run.logits:
            if run.logits.is_discarded:
                raise Aborted("the attempt was taken away")
            run.logits.finish()
        return run.result()

    def read_ahead(self, plan: Plan) -> None:
        """Begin with a shard, or let it follow those under way; `run` will pick it up."""
        with self._lock:
            self._begin(plan)

    def ask(self, load: Load, number: int) -> None:
        """Have the device answer a canary after what it was given before; `answer` waits for it."""
        with self._lock:
            self._asked += 1
            plan = Plan(
                attempt_id=-self._asked,
                load=load,
                dataset="",
                directory=Path(),
                samples=samples(load.input.shape[0]),
                canary=number,
            )
            self._question = self._begin(plan)

    def answer(self) -> tuple[int, Listener, float] | None:
        """The number of the canary asked last, what the device said, and its ms; None if none was. Raises as `run`."""
        with self._lock:
            question = self._question
            if question is None:
                return None
            question.claimed = True
        try:
            question.ended.wait()
        finally:
            with self._lock:
                self._forget(question)
        if question.error is not None:
            raise question.error
        assert isinstance(question.reducer, Listener)
        return question.plan.canary or 0, question.reducer, sum(map(sum, question.batch_ms))

    def canary_due(self, load: Load) -> int | None:
        """Which canary this model should be asked: the first once it is loaded, others in turn as much is done."""
        with self._lock:
            if self._question is not None:
                return None
            if load != self._load or self._since_canary is None:
                return 0
            return 1 + self._asked % (canary.COUNT - 1) if self._since_canary >= EVERY else None

    def is_asked(self) -> bool:
        """Whether an answer is still to be taken."""
        with self._lock:
            return self._question is not None

    def attempts(self) -> frozenset[int]:
        """Those under way."""
        with self._lock:
            return frozenset(attempt_id for attempt_id in self._runs if attempt_id > 0)

    def drop(self, attempts: Collection[int]) -> None:
        """Stop working for attempts that may not write any more."""
        with self._lock:
            for attempt_id in attempts:
                if run := self._runs.pop(attempt_id, None):
                    self._fail(run, Aborted("the attempt was taken away"))

    def late(self) -> list[tuple[int, FarmError]]:
        """Attempts that were dropped while the device worked on them, and how it broke at them; each is told once."""
        with self._lock:
            told, self._late = self._late, []
        return told

    def close(self) -> None:
        """Stop the threads and the device process. Runs under way are aborted."""
        with self._lock:
            self._closing = True
            for run in list(self._runs.values()):
                self._fail(run, Aborted("the worker is leaving"))
            self._stir()
        for thread in self._threads:
            thread.join(CLOSE_S)
        self.device.close()
        for thread in self._threads:
            thread.join(CLOSE_S)  # one that waited for a hanging device has been woken by its end
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    # -- under the lock ------------------------------------------------------------------------------------------

    def _begin(self, plan: Plan) -> _Run:
        if plan.attempt_id in self._runs:
            return self._runs[plan.attempt_id]
        reducer: Reducer
        if plan.loop:
            reducer = Deaf()
        elif plan.canary is None:
            reducer = reducer_of(plan.dataset, plan.directory, self._threads_for_post)
        else:
            reducer = Listener(plan.load.path, plan.canary)
        is_small = plan.logits is None and plan.load.output.nbytes <= SMALL
        run = _Run(plan, reducer, Writer(plan.logits) if plan.logits else None, is_small)
        self._runs[plan.attempt_id] = run
        if self._closing:
            self._fail(run, Aborted("the worker is leaving"))
            return run
        batches = [_Batch(run, slots, list(range(len(slots)))) for slots in self._batches(run)]
        run.open_batches = len(batches)
        self._todo.extend(batches)
        self._stir()
        return run

    def _batches(self, run: _Run) -> Iterator[Sequence[Slot]]:
        """The slots of a run's batches: samples whole and in order, none over an edge; see `farm.sharding`."""
        samples, bs = run.plan.samples, run.plan.bs
        edges = sharding.edges([sample.parts for sample in samples], bs)
        for start, stop in pairwise(edges):
            slots = [Slot(sample, part) for sample in samples[start:stop] for part in range(sample.parts)]
            yield from (slots[i : i + bs] for i in range(0, len(slots), bs))

    def _fail(self, run: _Run, error: FarmError) -> None:
        if not run.ended.is_set():
            run.error = error
            run.ended.set()
        if run.logits:
            run.logits.discard()
        self._todo = deque(b for b in self._todo if b.run is not run)
        for group in [g for g in self._ready if g[0].run is run]:
            self._ready.remove(group)
            self._release(group)
        self._release(run.holding)
        run.holding = []
        self._stir()

    def _fail_all(self, exc: Exception) -> None:
        error = exc if isinstance(exc, FarmError) else DeviceError(f"internal error: {exc!r}")
        for run in list(self._runs.values()):
            if not run.claimed:  # it has not failed at anything: whoever claims it begins afresh
                self._forget(run)
            self._fail(run, error)

    def _forget(self, run: _Run) -> None:
        self._runs.pop(run.plan.attempt_id, None)
        if run is self._question:
            self._question = None

    def _release(self, group: _Group) -> None:
        self._free_inputs(group)
        for batch in group:
            if batch.wanted is not None:
                self._free_out.append(batch.wanted)
                batch.wanted = None

    def _free_inputs(self, group: _Group) -> None:
        for batch in group:
            if batch.given is not None:
                self._free_in.append(batch.given)
                batch.given = None

    def _finish(self, run: _Run, batches: int = 1) -> None:
        run.open_batches -= batches
        if run.open_batches == 0:
            began = perf_counter()
            self._take_rows(run, *run.reducer.rest())
            run.post_ms += 1000 * (perf_counter() - began)
            run.ended.set()
            self._let_go(run)

    def _take_rows(self, run: _Run, rows: Sequence[SampleResult], bad: Sequence[Sample]) -> None:
        """Rows of samples, and samples whose scores are not finite."""
        run.rows.update((row.name, row) for row in rows)
        if bad and run.plan.non_finite_before:
            for sample in bad:
                run.fail_sample(sample, "its scores are not finite numbers, on two attempts")
        elif bad:
            names = ", ".join(sample.name for sample in bad)
            self._fail(run, NonFinite(f"scores of {names} are not finite numbers"))

    def _stir(self) -> None:
        """Send what can be sent, and wake the threads that have something to do now, and no others."""
        while self._sendable():
            self._send()
        for condition, is_due in (
            (self._to_read, self._readable),
            (self._to_drive, self._drivable),
            (self._to_post, self._reducible),
        ):
            if is_due():
                condition.notify()

    # -- the threads ---------------------------------------------------------------------------------------------

    def _guard(self, work: Callable[[], None]) -> None:
        """A thread that breaks ends every run with its error rather than leaving them waiting."""
        # The device process wakes one of them by saying that a batch is done, and is about to begin the next one: where
        # cores are few it would lose its own until post-processing has had its turn.
        schedule(os.SCHED_BATCH)
        while not self._closing:
            try:
                work()
            except Exception as exc:
                log.exception("pipeline thread failed")
                with self._lock:
                    self._fail_all(exc)

    def _read(self) -> None:
        while True:
            with self._lock:
                if not self._readable(going_on=True):
                    self._to_read.wait_for(self._readable)
                if self._closing:
                    return
                group = [self._todo.popleft() for _ in range(self._next_group())]
                for batch in group:
                    batch.given = self._free_in.pop()
                self._in_hand += 1
            began = perf_counter()
            try:
                for batch in group:
                    self._fill(batch)
            except BaseException:
                with self._lock:
                    self._in_hand -= 1
                    self._release(group)
                    self._stir()
                raise
            with self._lock:  # at once out of hand and in a queue: what is nowhere lets the model be switched
                self._in_hand -= 1
                run = group[0].run
                run.read_ms += 1000 * (perf_counter() - began)
                usable = [batch for batch in group if batch.active and run.error is None]
                empty = [batch for batch in group if batch not in usable]
                self._release(empty)
                if usable:
                    self._ready.append(usable)
                    for batch in usable:
                        batch.ready_at = monotonic()
                if empty and run.error is None:
                    self._finish(run, len(empty))
                self._stir()

    def _readable(self, *, going_on: bool = False) -> bool:
        """Whether the reader has something to do; one that is `going_on` need not be woken for it."""
        if self._closing or not self._todo:
            return self._closing
        plan = self._todo[0].run.plan
        # Parts of a batch that broke come after what was read ahead: where order matters, nothing is.
        clear = not (plan.isolating and (self._ready or self._sent or self._done or self._in_hand))
        group = self._next_group()
        enough = group if going_on else max(group, min(AT_ONCE, len(self._todo)))
        return self._load == plan.load and len(self._free_in) >= enough and clear

    def _next_group(self) -> int:
        """How many of the batches to be read are read, sent and answered together."""
        run = self._todo[0].run
        waits = not (self._ready or self._sent)  # the device, for whatever comes first
        if waits or not self._recent_ms or not run.is_small or self._ring is None:
            return 1
        most = len(self._ring.inputs) // DEPTH
        if most * self._usual_ms > GROUP_MS:
            most = max(1, int(GROUP_MS / self._usual_ms))
        return sum(1 for batch in islice(self._todo, most) if batch.run is run)

    def _fill(self, batch: _Batch) -> None:
        assert batch.given is not None
        array, run = batch.given.array, batch.run
        if run.plan.loop or run.plan.canary is not None:
            canary.fill(array, run.plan.canary or 0)
            return
        for place in range(len(array)):
            if place in batch.active:
                slot = batch.slots[place]
                if slot.part == 0 or slot.sample.name not in run.failed:
                    try:
                        read_bin(run.plan.directory, slot.sample, array[place], slot.part)
                        continue
                    except DataError as exc:
                        run.fail_sample(slot.sample, str(exc))
                        run.unusable += 1
                        if not slot.sample.problem:
                            run.unread = f"{slot.sample.name}: {exc}"
                batch.active.remove(place)
            array[place] = 0

    def _drive(self) -> None:
        while True:
            with self._lock:
                self._to_drive.wait_for(self._drivable)
                if self._closing and not self._sent:
                    return
                wanted = self._todo[0].run if self._loadable() else None
                if wanted is not None:  # until the switch is over, no buffer is filled and no batch sent
                    self._load = None
                    self._free_in, self._free_out = [], []
            done: _Group | None = None
            try:
                if wanted is not None:
                    self._switch(wanted)
                else:
                    done = self._receive()
            except Exception as exc:
                self._broken(exc if isinstance(exc, FarmError) else DeviceError(f"internal error: {exc!r}"))
            if done is not None:
                self._reduce(done)

    def _drivable(self) -> bool:
        return self._closing or bool(self._sent) or self._loadable()

    def _sendable(self) -> bool:
        if self._closing or not self._ready or len(self._sent) >= DEPTH:
            return False
        group = self._ready[0]
        return len(self._free_out) >= len(group) and group[0].run.plan.load == self._load

    def _loadable(self) -> bool:
        idle = not (self._ready or self._sent or self._done or self._in_hand)
        return bool(self._todo) and idle and self._load != self._todo[0].run.plan.load and not self._closing

    def _send(self) -> None:
        """Give the device the next group. Whoever makes that possible does it: to wake another thread takes longer."""
        group = self._ready.popleft()
        if not self._sent:
            self._since = monotonic()
        self._sent.append(group)
        for batch in group:
            batch.wanted = self._free_out.pop()
        self.device.send(id(group), [(batch.given, batch.wanted) for batch in group if batch.given and batch.wanted])

    def _receive(self) -> _Group | None:
        """Take in the next finished group; the answer is one that is to be reduced by who asks."""
        answer = None
        while answer is None:
            patience = self._patience()
            answer = self.device.finished(self._got_on() + patience - monotonic())
            if answer is None and monotonic() >= self._got_on() + patience:
                raise self.device.hung(patience)
        number, batch_times = answer
        with self._lock:
            group = self._sent[0]
            if id(group) != number or len(group) != len(batch_times):
                raise DeviceError("the device process answered out of turn")
            self._sent.popleft()
            self._since = monotonic()
            self._answered += len(group)
            run, began_ms = group[0].run, 1000 * self._since
            for batch, times in zip(reversed(group), reversed(batch_times), strict=True):
                began_ms -= sum(times)
                run.wait_ms += max(0.0, began_ms - 1000 * batch.ready_at)
            run.batch_ms += batch_times
            self._recent_ms.extend(map(sum, batch_times))
            self._usual_ms = statistics.median(self._recent_ms)
            if run.plan.canary is not None:
                self._since_canary = 0
            elif self._since_canary is not None:
                self._since_canary += len(group)
            if run.is_small:
                self._in_hand += 1
                return group  # its inputs are free after that: the reader would be in the way
            self._free_inputs(group)
            self._done.append(group)
            self._stir()
        return None

    def _got_on(self) -> float:
        """When the device began with what it works on, as far as is known."""
        return max(self._since, self._ring.done_at if self._ring else 0.0)

    def _patience(self) -> float:
        """Seconds that a batch may take."""
        if not self._recent_ms:
            return self._deadline_s * FIRST_PATIENCE
        if PATIENCE * max(self._recent_ms) / 1000 <= self._deadline_s:  # as usual, and then quicker to see
            return self._deadline_s
        return max(self._deadline_s, PATIENCE * self._usual_ms / 1000)

    def _switch(self, run: _Run) -> None:
        """Load the model of the next batch; nothing is under way."""
        began = perf_counter()
        ring: Ring | None = None
        try:
            ring = Ring(run.plan.load.input, run.plan.load.output)
            self.device.load(run.plan.load, ring)
        except Exception as exc:
            if ring is not None:
                ring.close()
            with self._lock:
                self._fail(run, exc if isinstance(exc, FarmError) else DeviceError(f"internal error: {exc!r}"))
                question = self._question
                if question is not None and not question.claimed and question.plan.load == run.plan.load:
                    self._forget(question)
                    self._fail(question, Aborted("its model does not load"))
            return
        with self._lock:
            if self._ring is not None:
                self._ring.close()
            self._ring, self._load = ring, run.plan.load
            self._free_in, self._free_out = list(ring.inputs), list(ring.outputs)
            self._begin_anew()
            run.load_ms += 1000 * (perf_counter() - began)
            self._stir()

    def _begin_anew(self) -> None:
        """What is known of a device process that has just loaded the model: nothing."""
        self._recent_ms.clear()
        self._usual_ms = 0.0
        self._answered = 0
        self._since_canary = None

    def _broken(self, error: FarmError) -> None:
        """Blame the batch that was on the device; give the others to the next process."""
        log.warning("device process %s: %s", self.device.pid, error)
        process_ended = isinstance(error, (DeviceCrashed, DeviceHung))
        with self._lock:
            load, ring, groups = self._load, self._ring, list(self._sent)
            self._load = None  # nothing is sent to a process that is about to go
            self._sent.clear()
            sent = list(chain(*groups))
            culprit = sent[min(ring.done - self._answered, len(sent) - 1)] if sent and ring else None
            for batch in sent:
                if batch.wanted is not None:
                    self._free_out.append(batch.wanted)
                    batch.wanted = None
            if culprit is not None:
                self._blame(culprit, error, process_ended)
            for group in reversed(groups):
                if culprit in group or group[0].run.error is not None:
                    self._release(group)
                else:
                    self._ready.appendleft(group)
            self._stir()
        if load is None or ring is None or self._closing:
            return
        try:
            if not process_ended:
                self.device.kill()  # what it was sent after the failed batch must not answer later
            self.device.load(load, ring)
            with self._lock:
                self._load = load
                self._begin_anew()
                self._stir()
        except Exception as exc:
            with self._lock:
                self._fail_all(exc)

    def _blame(self, batch: _Batch, error: FarmError, process_ended: bool) -> None:
        run = batch.run
        if isinstance(run.error, Aborted):
            self._late.append((run.plan.attempt_id, error))
        if run.error is not None:
            return
        if not (run.plan.isolating and (process_ended or isinstance(error, DataError))):
            self._fail(run, type(error)(f"{error} (batch of {batch.names()})"))
        elif len(batch.active) == 1:
            sample = batch.slots[batch.active[0]].sample
            run.broke[sample.name] = str(error)
            run.fail_sample(sample, f"breaks the device process: {error}")
            self._finish(run)
        else:
            half = len(batch.active) // 2
            parts = [_Batch(run, batch.slots, part) for part in (batch.active[:half], batch.active[half:])]
            run.open_batches += 1
            self._todo.extendleft(reversed(parts))
            self._stir()

    def _post(self) -> None:
        while True:
            with self._lock:
                self._to_post.wait_for(self._reducible)
                if self._closing:
                    return
                group = self._done.popleft()
                self._in_hand += 1
            self._reduce(group)

    def _reducible(self) -> bool:
        return self._closing or bool(self._done)

    def _reduce(self, group: _Group) -> None:
        began = perf_counter()
        run = group[0].run
        rows: list[SampleResult] = []
        bad: list[Sample] = []
        refused: HostError | None = None
        try:
            for batch in group:
                assert batch.wanted is not None
                slots, outputs = [batch.slots[place] for place in batch.active], batch.wanted.array
                if run.logits and run.error is None:
                    filled = zip(slots, batch.active, strict=True)
                    run.logits.append((slot.sample, slot.part, outputs[place]) for slot, place in filled)
                some_rows, some_bad = run.reducer.take(outputs, batch.active, slots, run.failed)
                rows += some_rows
                bad += some_bad
        except HostError as exc:  # of the disk: the others may have nothing to keep
            refused = exc
        except BaseException:
            with self._lock:
                self._in_hand -= 1
                self._release(group)
                self._stir()
            raise
        with self._lock:
            self._in_hand -= 1
            run.post_ms += 1000 * (perf_counter() - began)
            run.holding += group
            self._let_go(run)
            self._take_rows(run, rows, bad)
            if refused is not None:
                self._fail(run, refused)
            if run.error is None:
                self._finish(run, len(group))
            self._stir()

    def _let_go(self, run: _Run) -> None:
        """Free the outputs that the run's reducer does not need any more; all of them, if it has ended."""
        needed = [] if run.ended.is_set() else run.reducer.held()
        for batch in list(run.holding):
            assert batch.wanted is not None
            if not any(np.may_share_memory(part, batch.wanted.array) for part in needed):
                run.holding.remove(batch)
                self._release([batch])
