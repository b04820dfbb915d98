"""From what a user asked to a job in the database."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from db import devices, jobs, results
from db.engine import Database
from farm import artifacts, sharding, zoo
from farm.artifacts import Artifact
from farm.data import manifest
from farm.errors import DataError, UsageError
from farm.jobs import DeviceState, Job, JobSpec
from farm.settings import Settings
from farm.versions import versions
from farm.zoo.spec import ModelSpec
from tasks import local
from workers import ring
from workers.devices import LocalDevice, usable

#: Samples a second of a CPU slot before anything was measured.
UNKNOWN_FPS = 10.0
#: A device does about so many shards of a long job: what a shard costs beside its samples is spread over more of them,
#: up to so many times the usual length and so much of a lease, for what is lost with a device is a shard and that wait.
SHARDS_EACH, LONGEST, OF_A_LEASE = 6, 2.5, 1 / 6
#: The last ones of a long job are no longer than so much of the usual length: its devices end as close together.
LAST = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a user asked for."""

    model: str
    bs: int
    limit: int | None = None
    devices: tuple[str, ...] = ()
    artifact: str | None = None
    backend: str | None = None
    head: str | None = None
    dtype: str | None = None  #: of the bins
    priority: int = 0
    allow_failed: int = 0
    keep_logits: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A job that could be submitted."""

    spec: JobSpec
    shards: Sequence[tuple[int, int]]
    device_names: tuple[str, ...]  #: that would serve it now
    device_fps: float  #: expected of one device
    bin_bytes: int
    logits_bytes: int  #: of raw outputs that are kept
    ring_bytes: int  #: shared memory of a device, whatever the samples
    of_samples: int  #: that were prepared
    unused: Mapping[str, str]  #: of this host's devices those that are not used, and why

    @property
    def expected_s(self) -> float:
        return (self.spec.windows or self.spec.samples) / (self.device_fps * max(1, len(self.device_names)))

    def as_json(self) -> dict[str, Any]:
        return {
            "model": self.spec.model,
            "bs": self.spec.bs,
            "backend": self.spec.artifact.backend,
            "artifact": self.spec.artifact.sha256,
            "samples": self.spec.samples,
            "windows": self.spec.windows,
            "shards": len(self.shards),
            "devices": list(self.device_names),
            "unused": dict(self.unused),
            "bytes": self.bin_bytes,
            "ring_bytes": self.ring_bytes,
            "logits_bytes": self.logits_bytes,
            "device_fps": round(self.device_fps, 2),
            "expected_s": round(self.expected_s, 1),
        }


def plan(settings: Settings, database: Database, request: Request) -> Plan:
    """What the job would be. `UsageError` or `DataError` says what is missing and how to get it."""
    spec = zoo.get(request.model)
    if request.bs < 1:
        raise UsageError(f"--bs {request.bs}: a batch size is 1 or more")
    artifact = choose(settings, database, spec, request)
    directory = manifest.bins_dir(settings.data_dir, spec.recipe, artifact.input.dtype)
    try:
        data = manifest.read(directory)
    except DataError as exc:
        truth = "--labels val_label.txt" if spec.dataset == "imagenet" else "--annotations DIR"
        kind = "" if artifact.input.dtype == "float32" else f" --input {artifact.input.dtype}"
        hint = f"farm prepare {spec.name} --images DIR {truth}{kind}"
        hint += f", or farm prepare {spec.name} --synthetic 2000{kind}" if artifact.backend == "simulated" else ""
        raise DataError(f"{exc} ({hint})" if "run farm prepare" in str(exc) else str(exc)) from exc
    samples = len(data.samples) if request.limit is None else min(request.limit, len(data.samples))
    if samples < 1:
        raise UsageError(f"nothing to evaluate: --limit {request.limit}, {len(data.samples)} samples in {directory}")
    parts = [sample.parts for sample in data.samples[:samples]]
    here = _here(settings)
    names = _device_names(settings, database, request, artifact, here)
    with database.read() as conn:
        measured = results.throughput(conn, artifact.sha256)
    fps = measured or (UNKNOWN_FPS if artifact.backend == "ort" else spec.reference_fps.get(request.bs, UNKNOWN_FPS))
    return Plan(
        spec=replace(
            _nothing(spec, request, artifact),
            manifest_digest=data.digest,
            samples=samples,
            windows=0 if spec.dataset == "imagenet" else sum(parts),
            devices=request.devices,
            allow_failed=request.allow_failed,
            keep_logits=request.keep_logits,
            provenance={
                "versions": versions(),
                "manifest": data.digest,
                "source": data.header.source,
                "recipe": spec.recipe,
                "recipe_digest": data.header.recipe_digest,
            },
        ),
        shards=_shards(parts, request.bs, fps, len(names), settings),
        device_names=names,
        device_fps=fps,
        bin_bytes=sum(parts) * artifact.input.nbytes // request.bs,
        logits_bytes=sum(parts) * artifact.output.nbytes // request.bs if request.keep_logits else 0,
        ring_bytes=ring.nbytes(artifact.input.nbytes, artifact.output.nbytes),
        of_samples=len(data.samples),
        unused={d.name: d.unusable for d in here if d not in usable(settings, here)},
    )


def choose(settings: Settings, database: Database, spec: ModelSpec, request: Request) -> Artifact:
    """The artifact that what is asked for needs. `UsageError` if none fits."""
    with database.read() as conn:
        there = {(d.backends, d.soc) for d in devices.live(conn, database, settings.lease_s)}
    there |= {(d.backends, d.soc) for d in usable(settings, _here(settings))}
    simulated = {soc for backends, soc in there if "simulated" in backends}
    return artifacts.choose(
        settings.data_dir,
        spec,
        request.bs,
        backend=request.backend or _usual_backend({backends for backends, _ in there}),
        wanted=request.artifact,
        head=request.head,
        dtype=request.dtype,
        soc=simulated.pop() if len(simulated) == 1 else "cpu",
    )


def _nothing(spec: ModelSpec, request: Request, artifact: Artifact) -> JobSpec:
    """A job of an artifact, and of no samples yet."""
    return JobSpec(
        model=spec.name,
        bs=request.bs,
        artifact=artifact,
        dataset=spec.dataset,
        recipe=spec.recipe,
        dtype=artifact.input.dtype,
        manifest_digest="",
        samples=0,
        priority=request.priority,
        provenance={"versions": versions()},
    )


def plan_speed(settings: Settings, database: Database, request: Request, loop: int) -> list[JobSpec]:
    """A job of speed for each device that would serve what is asked for: so many batches, timed."""
    spec = zoo.get(request.model)
    artifact = choose(settings, database, spec, request)
    timed = replace(_nothing(spec, request, artifact), loop=loop)
    names = _device_names(settings, database, request, artifact, _here(settings))
    return [replace(timed, devices=(name,)) for name in names]


def submit_speed(database: Database, specs: Sequence[JobSpec]) -> list[Job]:
    """Write jobs of speed; all devices begin at once."""
    with database.write() as conn:
        return [jobs.create(conn, database, spec, [(0, 0)]) for spec in specs]


def _shards(parts: Sequence[int], bs: int, fps: float, devices: int, settings: Settings) -> list[tuple[int, int]]:
    """Of samples of so many parts each, of which a device does `fps`: shards as usual, longer ones of long jobs."""
    edges = sharding.edges(parts, bs)
    a_step = sum(parts) / (len(edges) - 1)
    share_s = sum(parts) / fps / devices
    longest = min(LONGEST * settings.shard_s, OF_A_LEASE * settings.lease_s)
    seconds = max(settings.shard_s, min(longest, share_s / SHARDS_EACH))
    return sharding.cut(
        edges,
        per_shard=int(seconds * fps / a_step),
        per_last=int(LAST * settings.shard_s * fps / a_step),
        devices=devices,
    )


def submit(database: Database, plans: Sequence[Plan]) -> list[Job]:
    """Write jobs and their shards; the farm takes them up one after another."""
    written: list[Job] = []
    with database.write() as conn:
        for each in plans:
            first = written[0].id if written else None
            written.append(jobs.create(conn, database, each.spec, each.shards, first))
    return written


def _here(settings: Settings) -> list[LocalDevice]:
    """This host's devices, where it serves its own farm."""
    return local.devices(settings) if settings.is_embedded else []


def _usual_backend(there: Collection[tuple[str, ...]]) -> str | None:
    """What all devices there are serve first: acl on NPUs, ort on CPUs, simulated on a farm that simulates only."""
    first = {backends[0] for backends in there}
    return first.pop() if len(first) == 1 else None


def _device_names(
    settings: Settings, database: Database, request: Request, artifact: Artifact, here: Sequence[LocalDevice]
) -> tuple[str, ...]:
    """The devices that would serve a job; `UsageError` for a name nobody knows."""
    with database.read() as conn:
        registered = devices.everything(conn)
        up = devices.live(conn, database, settings.lease_s)
    known = {d.name: _about(d.name, d.soc, d.backends) for d in registered}
    known |= {d.name: _about(d.name, d.soc, d.backends) for d in here}
    unknown = [name for name in request.devices if name not in known]
    if unknown:
        raise UsageError(
            f"unknown device {', '.join(unknown)}: the farm knows {', '.join(sorted(known)) or 'none yet'}"
        )
    resting = {d.name for d in registered if d.drained or d.state is DeviceState.QUARANTINED}
    well = [d for d in usable(settings, here) if artifact.runs_on(d.backends, d.soc) and d.name not in resting]
    serving = {d.name for d in devices.matching(up, artifact, ())} | {d.name for d in well}
    if not serving.intersection(request.devices or serving):  # the job waits for those that are away for the moment
        serving = {d.name for d in devices.matching(registered, artifact, ())}
    chosen = sorted(serving.intersection(request.devices) if request.devices else serving, key=_by_host_and_index)
    if not chosen:
        known |= {d.name: f"{d.name} ({d.unusable})" for d in here if d not in usable(settings, here)}
        listing = ", ".join(text for _, text in sorted(known.items())) or "none yet"
        chip = f" for {artifact.chip}" if artifact.chip else ""
        raise UsageError(f"no device serves backend {artifact.backend}{chip}: the farm knows {listing}")
    return tuple(chosen)


def _about(name: str, soc: str, backends: Collection[str]) -> str:
    return f"{name} ({soc}: {', '.join(backends)})"


def _by_host_and_index(name: str) -> tuple[str, int]:
    host, index = name.rsplit(":", 1)
    return host, int(index)
