"""
A farm of several hosts on one machine: network namespaces on a bridge, real servers, the installed commands.

A host is a network namespace with an address of its own, a FARM_HOME, FARM_DATA and FARM_HOST; its services are kept
running as an init system would. Without root or `ip` all hosts share the loopback, and none can be cut off. Whatever
ends the test process ends everything it started; namespaces that a killed one left are removed by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol, cast

import numpy as np
import psutil
from sqlalchemy import text

from db.engine import Database
from farm.data import manifest
from farm.data.manifest import Manifest, Sample
from farm.errors import StorageError
from farm.reports.report import build
from farm.settings import Settings
from tasks.submission import Request, plan, submit
from tests.datasets import name_of, write_bins
from tests.servers import Postgres, Valkey
from workers.backends.simulated import scores

FARM = Path(sys.executable).with_name("farm")
#: Where the user's commands and the coordinator run: a host without devices.
HEAD = "head"
#: An init system's pause before it starts a service again.
RESTART_S = 0.5
#: Short times, so that a test sees a lease end.
TIMES = {"FARM_HEARTBEAT_S": "0.3", "FARM_LEASE_S": "3", "FARM_DEADLINE_S": "3", "FARM_SHARD_S": "0.5"}
BATCH_MS = 50.0


def wait_for(condition: Callable[[], Any], timeout: float = 30.0, what: str | Callable[[], str] = "") -> Any:
    """The first true value of `condition`; fails with `what` when the time is over."""
    deadline = monotonic() + timeout
    while not (value := condition()):
        said = what if isinstance(what, str) or monotonic() < deadline else what()
        assert monotonic() < deadline, f"not within {timeout} s: {said}"
        sleep(0.05)
    return value


# -- data ------------------------------------------------------------------------------------------------------------


def write_many_bins(data_dir: Path, samples: int, *, distinct: int = 61) -> Manifest:
    """As many samples as wanted on little disk: names are links to `distinct` bins, whose number divides no batch."""
    few = write_bins(data_dir, min(samples, distinct))
    directory = manifest.bins_dir(data_dir, "lvvit")
    many = list(few.samples)
    for number in range(distinct + 1, samples + 1):
        like = few.samples[(number - 1) % distinct]
        os.link(manifest.bin_path(directory, like.name), manifest.bin_path(directory, name_of(number)))
        many.append(Sample(name_of(number), number % 1000, like.xxh3))
    return manifest.write(directory, few.header, many)


def simulated_digest(samples: Sequence[Sample]) -> str:
    """What an undisturbed run of the simulated backend answers, without a farm."""
    best: dict[str, str] = {}
    digest = hashlib.sha256()
    for sample in samples:
        if sample.xxh3 not in best:
            order = np.argsort(-scores(int(sample.xxh3, 16), 1000), kind="stable")
            best[sample.xxh3] = ",".join(map(str, order[:5]))
        digest.update(f"{sample.name}\t{best[sample.xxh3]}\n".encode())
    return digest.hexdigest()


def simulate(*faults: Mapping[str, Any], compute_ms: float = BATCH_MS) -> dict[str, str]:
    """The setting that makes a host's simulated devices so."""
    return {"FARM_SIMULATED": json.dumps({"compute_ms": compute_ms, "faults": faults})}


@dataclass(frozen=True, kw_only=True)
class Count:
    """A job's counting rows against the names it should have, counted without the farm's own counting."""

    lost: int
    duplicates: int
    strange: int
    failed: int
    digest: str

    @property
    def exact(self) -> bool:
        return not (self.lost or self.duplicates or self.strange)


# -- networks --------------------------------------------------------------------------------------------------------


class Network(Protocol):
    """What joins the hosts."""

    can_cut: bool
    address: str  #: that the servers listen on

    def enter(self, host: str) -> list[str]:
        """What to put before a command for it to run on a host."""

    def partition(self, host: str) -> None: ...

    def heal(self, host: str) -> None: ...

    def remove(self) -> None: ...


class Loopback:
    """All hosts are this one."""

    can_cut = False
    address = "127.0.0.1"

    def enter(self, host: str) -> list[str]:
        return []

    def partition(self, host: str) -> None:
        raise NotImplementedError("hosts that share the loopback cannot be cut off")

    def heal(self, host: str) -> None:
        pass

    def remove(self) -> None:
        pass


_numbers = count(1)


class Namespaces:
    """A network namespace a host; their cables end in a bridge, which has the servers' address."""

    can_cut = True

    def __init__(self, hosts: Sequence[str]) -> None:
        remove_leftovers()
        mark = f"{os.getpid()}x{next(_numbers)}"
        self._bridge = f"fb{mark}"
        self._names = {host: f"farmtest-{mark}-{host}" for host in hosts}
        self._cables = {host: f"fv{mark}{'abcdefgh'[place]}" for place, host in enumerate(hosts)}
        subnet = _free_subnet()
        self.address = f"{subnet}.1"
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for place, host in enumerate(hosts):
                name, cable = self._names[host], self._cables[host]
                _ip("netns", "add", name)
                _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("link", "set", cable, "master", self._bridge, "up")
                _ip("-n", name, "addr", "add", f"{subnet}.{10 + place}/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                _ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.remove()
            raise

    def enter(self, host: str) -> list[str]:
        return [shutil.which("nsenter") or "nsenter", f"--net=/run/netns/{self._names[host]}"]

    def partition(self, host: str) -> None:
        """Pull the cable at the bridge's end: the host notices nothing but silence."""
        _ip("link", "set", self._cables[host], "down")

    def heal(self, host: str) -> None:
        _ip("link", "set", self._cables[host], "up")

    def remove(self) -> None:
        for cable in (*self._cables.values(), self._bridge):
            _ip("link", "del", cable, check=False)
        for name in self._names.values():
            _ip("netns", "del", name, check=False)


def can_have_namespaces() -> bool:
    """Whether this process may make network namespaces."""
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("nsenter")):
        return False
    name = f"farmtest-{os.getpid()}x0-try"
    made = _ip("netns", "add", name, check=False) == 0
    made = made and _ip("-n", name, "link", "set", "lo", "up", check=False) == 0
    _ip("netns", "del", name, check=False)
    return made


def remove_leftovers() -> None:
    """What a killed test process left: its children died with it, its namespaces and links did not."""
    for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else ():
        if (found := re.match(r"farmtest-(\d+)x", name)) and not psutil.pid_exists(int(found[1])):
            _ip("netns", "del", name, check=False)
    for name in os.listdir("/sys/class/net"):
        if (found := re.match(r"f[bv](\d+)x\d", name)) and not psutil.pid_exists(int(found[1])):
            _ip("link", "del", name, check=False)


def _ip(*arguments: str, check: bool = True) -> int:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert not (check and done.returncode), f"ip {' '.join(arguments)}: {done.stderr}"
    return done.returncode


def _free_subnet() -> str:
    """The first three numbers of a /24 that nothing here uses."""
    while True:
        subnet = f"10.{random.randint(64, 250)}.{random.randint(0, 255)}"
        routes = subprocess.run(["ip", "-4", "route"], capture_output=True, text=True, check=True).stdout
        if f"{subnet}." not in routes:
            return subnet


# -- services --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Service:
    """A command that is started again when it ends, until it is told to stop."""

    command: Sequence[str]
    env: Mapping[str, str]
    log_file: Path
    wanted: bool = False
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _next_start: float = 0.0

    @property
    def pid(self) -> int | None:
        process = self.process
        return process.pid if process is not None and process.poll() is None else None

    def watch(self) -> None:
        """Called by one thread, which must outlive the process: its leash ends with that thread."""
        if self.process is not None and self.process.poll() is None:
            self._next_start = monotonic() + RESTART_S
        elif self.wanted and monotonic() >= self._next_start:
            leash = [sys.executable, "-m", "farm.leash", str(os.getpid())]
            with self.log_file.open("ab") as log:
                self.process = subprocess.Popen(
                    [*leash, *self.command], env=dict(self.env), stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.starts += 1

    def start(self) -> None:
        self._next_start = 0.0
        self.wanted = True

    def kill(self) -> None:
        """SIGKILL; it is started again unless it is not wanted any more."""
        self.signal(signal.SIGKILL)

    def signal(self, number: int) -> None:
        if self.pid is not None and self.process is not None:
            self.process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        self.tell()
        return self.wait()

    def tell(self) -> None:
        """SIGTERM."""
        self.wanted = False
        sleep(0.1)  # a start that was under way
        self.signal(signal.SIGTERM)

    def wait(self, timeout: float = 40.0) -> int:
        """Its exit code."""
        if self.process is None:
            return 0
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


# -- the cluster -----------------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Hosts with so many devices each, on one Postgres and one Valkey."""

    root: Path
    slots: Mapping[str, int] = field(default_factory=lambda: {"a": 3, "b": 3, "c": 2})
    env: dict[str, str] = field(default_factory=dict)
    host_env: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: int = 400
    copies: bool = False  #: of the data, one a host; otherwise all read one folder

    network: Network = field(init=False)
    postgres: Postgres = field(init=False)
    valkey: Valkey = field(init=False)
    workers: dict[str, Service] = field(init=False, default_factory=dict)
    coordinator: Service = field(init=False)
    data: Manifest = field(init=False)

    def __enter__(self) -> Cluster:
        hosts = (*self.slots, HEAD)
        self._commands: list[subprocess.Popen[str]] = []
        self._over = threading.Event()
        self._init = threading.Thread(target=self._watch, name="init", daemon=True)
        self.data = write_many_bins(self.root / "data", self.samples)
        self.network = Namespaces(hosts) if can_have_namespaces() else Loopback()
        try:
            self.postgres = Postgres(address=self.network.address)
            self.valkey = Valkey(address=self.network.address)
            self.postgres.start()
            self.valkey.start()
            self.postgres.create_database("farm")
            for host in hosts:
                self._make_host(host)
            for host in self.slots:
                self.workers[host] = self._service(host, "worker")
            self.coordinator = self._service(HEAD, "coordinator")
            self._init.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything, the servers last."""
        self._over.set()
        if self._init.ident:
            self._init.join()
        for process in self.processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for command in self._commands:
            command.kill()
            if command.stdout and not command.stdout.closed:
                command.communicate()
        for service in self._services():
            if service.process is not None:
                service.process.wait()
        if "database" in self.__dict__:
            self.database.close()
        for server in (self.__dict__.get("valkey"), self.__dict__.get("postgres")):
            if server is not None:
                server.close()
        if "network" in self.__dict__:
            self.network.remove()

    def _services(self) -> list[Service]:
        found = list(self.workers.values())
        return [*found, self.coordinator] if "coordinator" in self.__dict__ else found

    def _make_host(self, host: str) -> None:
        self.home(host).mkdir(parents=True)
        if self.copies:
            shutil.copytree(self.root / "data", self.data_dir(host), copy_function=os.link)

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for service in self._services():
                service.watch()

    def _service(self, host: str, *arguments: str) -> Service:
        return Service(
            [*self.network.enter(host), str(FARM), *arguments],
            self.environment(host),
            self.root / f"{arguments[0]}-{host}.log",
        )

    # -- places and settings -----------------------------------------------------------------------------------------

    def home(self, host: str) -> Path:
        return self.root / "homes" / host

    def data_dir(self, host: str) -> Path:
        return self.home(host) / "data" if self.copies else self.root / "data"

    def environment(self, host: str) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FARM_")}
        return {
            **clean,
            **TIMES,
            **simulate(),
            "FARM_HOME": str(self.home(host)),
            "FARM_DATA": str(self.data_dir(host)),
            "FARM_HOST": host,
            "FARM_CPU_SLOTS": str(self.slots.get(host, 1)),
            "FARM_BROKER_URL": self.valkey.url(),
            "FARM_DATABASE_URL": self.postgres.url("farm"),
            **self.env,
            **self.host_env.get(host, {}),
        }

    def reconfigure(self, **host_env: Mapping[str, str]) -> None:
        """Other settings for hosts, from their services' next start on."""
        for host, env in host_env.items():
            self.host_env[host] = dict(env)
            self.workers[host].env = self.environment(host)

    # -- commands ----------------------------------------------------------------------------------------------------

    def up(self, *hosts: str, timeout: float = 60.0) -> None:
        """Start the coordinator and the hosts' workers, all of them unless some are named, and wait for the devices."""
        hosts = hosts or tuple(self.slots)
        self.coordinator.start()
        for host in hosts:
            self.workers[host].start()
        wanted = {name for host in hosts for name in self.names(host)}
        wait_for(lambda: wanted <= self.live(), timeout, lambda: f"{wanted - self.live()} come up: {self.logs()}")

    def stop_workers(self) -> None:
        """Tell all hosts to leave, at once, and wait until they have."""
        for service in self.workers.values():
            service.tell()
        codes = {host: service.wait() for host, service in self.workers.items()}
        assert not any(codes.values()), codes

    def start(self, *arguments: str, host: str = HEAD) -> subprocess.Popen[str]:
        """A command on a host, in the background."""
        command = subprocess.Popen(
            [*self.network.enter(host), str(FARM), *arguments],
            env=self.environment(host),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._commands.append(command)
        return command

    def run(
        self, *arguments: str, host: str = HEAD, code: int | None = 0, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host, to its end; its exit code must be `code`."""
        command = self.start(*arguments, host=host)
        try:
            stdout, stderr = command.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            command.kill()
            raise AssertionError(f"farm {' '.join(arguments)} takes over {timeout} s: {self.logs()}") from None
        if code is not None:
            assert command.returncode == code, f"farm {' '.join(arguments)}: {stdout}{stderr}{self.logs()}"
        assert "Traceback" not in stderr
        return subprocess.CompletedProcess(command.args, command.returncode, stdout, stderr)

    def submit_in_background(self, *, limit: int | None = None, devices: tuple[str, ...] = ()) -> int:
        """The number of a new job of the simulated backend that nobody waits for; the coordinator will see it."""
        settings = Settings(
            data=self.root / "data",
            broker_url=self.valkey.url(),
            heartbeat_s=float(TIMES["FARM_HEARTBEAT_S"]),
            lease_s=float(TIMES["FARM_LEASE_S"]),
            shard_s=float(TIMES["FARM_SHARD_S"]),
        )
        request = Request(model="lvvit", bs=4, backend="simulated", limit=limit, devices=devices)
        return submit(self.database, [plan(settings, self.database, request)])[0].id

    def report(self, job: int) -> dict[str, Any]:
        return build(self.database, job)

    def finish(self, job: int, timeout: float = 120) -> str:
        """A job's state once it has ended."""

        def ended() -> str:
            state = str(self.sql("SELECT state FROM job WHERE id = :job", job=job)[0][0])
            return "" if state in ("pending", "running") else state

        return str(wait_for(ended, timeout, lambda: f"job {job} ends: {self.standing(job)}{self.logs()}"))

    # -- looking -----------------------------------------------------------------------------------------------------

    @cached_property
    def database(self) -> Database:
        return Database(self.postgres.url("farm"))

    def sql(self, query: str, **values: object) -> list[tuple[Any, ...]]:
        """Rows; a server that is just being restarted is waited for."""
        deadline = monotonic() + 30
        while True:
            try:
                with self.database.read() as conn:
                    return [tuple(row) for row in conn.execute(text(query), values)]
            except StorageError:
                if monotonic() > deadline:
                    raise
                sleep(0.2)

    def execute(self, statement: str, **values: object) -> None:
        """What no verb does."""
        with self.database.write() as conn:
            conn.execute(text(statement), values)

    def names(self, host: str) -> list[str]:
        return [f"{host}:{index}" for index in range(self.slots[host])]

    def live(self) -> set[str]:
        """Devices that are up and were heard of just now."""
        if not self.sql("SELECT to_regclass('device')")[0][0]:
            return set()
        age = "extract(epoch FROM clock_timestamp()) - heartbeat"
        lease = self.environment(HEAD)["FARM_LEASE_S"]
        return {name for (name,) in self.sql(f"SELECT name FROM device WHERE state = 'up' AND {age} < {lease}")}

    def scored(self, job: int) -> int:
        return int(self.sql("SELECT count(*) FROM result WHERE job_id = :job AND superseded = 0", job=job)[0][0])

    def running(self, device: str) -> list[int]:
        """Attempts that run on a device now."""
        return [i for (i,) in self.sql("SELECT id FROM attempt WHERE device = :d AND state = 'running'", d=device)]

    def standing(self, job: int) -> str:
        shards = dict(self.sql("SELECT state, count(*) FROM shard WHERE job_id = :job GROUP BY 1", job=job))
        attempts = dict(self.sql("SELECT state, count(*) FROM attempt WHERE job_id = :job GROUP BY 1", job=job))
        live = self.sql(
            "SELECT shard_id, device, incarnation, state, rung - assigned FROM attempt "
            "WHERE job_id = :job AND state IN ('assigned', 'running')",
            job=job,
        )
        age = "extract(epoch FROM clock_timestamp()) - heartbeat"
        devices = self.sql(f"SELECT name, state, incarnation, pid, {age} FROM device ORDER BY name")
        return f"shards {shards}, attempts {attempts}, live {live}, devices {devices}"

    def count(self, job: int, samples: int | None = None) -> Count:
        """A job's counting rows, compared with the manifest's names."""
        expected = {s.name for s in self.data.samples[:samples]}
        rows = self.sql(
            "SELECT name, state, class1, class2, class3, class4, class5 FROM result "
            'WHERE job_id = :job AND superseded = 0 ORDER BY name COLLATE "C"',
            job=job,
        )
        names = Counter(row[0] for row in rows)
        digest = hashlib.sha256()
        for name, state, *best in rows:
            digest.update(f"{name}\t{','.join(map(str, best)) if state == 'scored' else '!'}\n".encode())
        return Count(
            lost=len(expected - names.keys()),
            duplicates=sum(found - 1 for found in names.values()),
            strange=len(names.keys() - expected),
            failed=sum(row[1] == "failed" for row in rows),
            digest=digest.hexdigest(),
        )

    def expected_digest(self, samples: int | None = None) -> str:
        return simulated_digest(self.data.samples[:samples])

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster's hosts, but for those on their way out."""
        mine = f"{self.root}{os.sep}"
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                ours = process.environ().get("FARM_HOME", "").startswith(mine)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def pids(self, words: str, host: str | None = None) -> list[int]:
        """Processes of a host, or of all, whose command line has these words."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                there = host in (None, process.environ().get("FARM_HOST"))
                if there and words in line and "farm.leash" not in line:
                    found.append(process.pid)
        return found

    def worker_pid(self, device: str) -> int:
        """The process of a device's worker, which is there or about to be."""
        return int(wait_for(lambda: self._exactly(f"tasks.worker {device}"), 30, f"{device} has a worker")[0])

    def _exactly(self, ending: str) -> list[int]:
        return [pid for pid in self.pids(ending) if _line(pid).endswith(ending)]

    def device_pids(self, host: str | None = None) -> list[int]:
        return self.pids("workers.device_process", host)

    def unacked(self) -> int:
        """Messages that were taken and neither acknowledged nor given back."""
        with self.valkey.admin() as broker:
            return broker.hlen("farm:unacked")

    def waiting(self) -> int:
        """Messages that nobody has taken yet, and those that were and are not acknowledged."""
        with self.valkey.admin() as broker:
            queues = [key for key in cast("list[bytes]", broker.keys("farm:npu.*")) if broker.type(key) == b"list"]
            lengths = [broker.llen(queue) for queue in queues]
        return sum(lengths) + self.unacked()

    def broker_keys(self) -> list[str]:
        """Everything the broker holds."""
        with self.valkey.admin() as broker:
            return sorted(key.decode() for key in cast("list[bytes]", broker.keys("*")))

    def log(self, host: str) -> str:
        """All that a host's services wrote."""
        files = [*self.root.glob(f"*-{host}.log"), *sorted((self.home(host) / "log").glob("*.log"))]
        return "".join(file.read_text(errors="replace") for file in files)

    def logs(self) -> str:
        """The last words of every host, for a test that failed."""
        return "".join(f"\n--- {host}\n{self.log(host)[-1200:]}" for host in (*self.slots, HEAD))


SUBMIT = ("submit", "lvvit", "--bs", "4", "--backend", "simulated")


def _line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


# -- taking protection away ------------------------------------------------------------------------------------------

#: Run by every Python process that finds it: changes the source of a module while it is imported.
_MUTATOR = """
import importlib.abc, importlib.machinery, json, os, sys

MUTATIONS = json.loads(os.environ["TEST_MUTATIONS"])


class Loader(importlib.machinery.SourceFileLoader):
    def get_data(self, path):
        data = super().get_data(path)
        if path.endswith(".py"):
            for module, old, new in MUTATIONS:
                if module == self.name:
                    source = data.decode()
                    if old and source.count(old) != 1:
                        sys.exit(f"a mutation of {module} does not apply any more: {old!r}")
                    data = (source.replace(old, new) if old else source + new).encode()
        return data

    def get_code(self, fullname):  # never from or into a cache
        return compile(self.get_data(self.path), self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in {module for module, _, _ in MUTATIONS}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.origin is None:
            return None
        spec.loader = Loader(fullname, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
"""


def mutate(scratch: Path, mutations: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """
    The environment in which Python processes run with their source changed: of a module, one text for another, or
    in place of none a text at its end.

    A text that does not stand in the module exactly once ends the process with a word about it.
    """
    directory = scratch.parent / f"{scratch.name}-mutations"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sitecustomize.py").write_text(_MUTATOR)
    return {"PYTHONPATH": str(directory), "TEST_MUTATIONS": json.dumps(list(mutations))}
