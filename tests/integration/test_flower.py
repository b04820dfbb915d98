"""farm flower: a real dashboard over HTTP, on a real broker that asks for a password, with a real Celery worker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from farm.leash import ROOT
from tasks.app import SHARD_TASK, make_app, queue_of, worker_name
from tasks.dispatch import ring
from tests.acceptance.conftest import FARM, Farm, wait_for
from tests.servers import Valkey

DEVICE = "rack-7:3"
WORKER = "npu3@rack-7"
ARGUMENTS = "lvvit bs=4 samples=0..27 try=1"
PAGES = ("/", "/workers", "/workers?json=1", f"/worker/{WORKER}", "/tasks", "/task/j1.s1.a1", "/broker", "/metrics")


@dataclass
class Process:
    """What a test started, and what it said."""

    popen: subprocess.Popen[bytes]
    output: Path

    def said(self) -> str:
        return self.output.read_text()


@dataclass
class _Assignment:
    """As much of one as a message tells."""

    attempt_id: int
    shard_id: int = 1

    @property
    def task_id(self) -> str:
        return f"j1.s1.a{self.attempt_id}"

    def __str__(self) -> str:
        return ARGUMENTS


@dataclass
class CountingWorker(Process):
    """The farm's Celery worker; what it is asked to evaluate it only writes down."""

    app: Celery

    def evaluated(self) -> list[int]:
        return [int(number) for number in re.findall(r"^evaluate (-?\d+)$", self.said(), re.MULTILINE)]

    def send(self, attempt_id: int) -> None:
        """As the farm sends."""
        each: Any = SimpleNamespace(device=DEVICE, assignment=_Assignment(attempt_id))
        ring(self.app, [each])

    def goes_on(self, attempt_id: int) -> None:
        """A message that is sent now is heard."""
        self.send(attempt_id)
        wait_for(
            lambda: attempt_id in self.evaluated(), 20, f"attempt {attempt_id} is evaluated: {self.said()[-2000:]}"
        )


@dataclass
class Dashboard(Process):
    """A Flower that is up."""

    url: str = ""

    def get(self, path: str, auth: str = "") -> tuple[int, str]:
        request = urllib.request.Request(self.url + path)
        if auth:
            request.add_header("Authorization", f"Basic {b64encode(auth.encode()).decode()}")
        return _fetch(request)

    def post(self, path: str, auth: str) -> tuple[int, str]:
        request = urllib.request.Request(self.url + path, data=b"", method="POST")
        request.add_header("Authorization", f"Basic {b64encode(auth.encode()).decode()}")
        return _fetch(request)

    def shows(self, path: str, text: str, auth: str = "") -> None:
        wait_for(lambda: text in self.get(path, auth)[1], 20, f"{path} shows {text!r}: {self.said()[-2000:]}")


def _fetch(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, unescape(answer.read().decode())
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, exc.read().decode()


def environment(broker: Valkey, home: Path, **more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("FARM_")}
    return {**clean, "FARM_HOME": str(home), "FARM_BROKER_URL": broker.url(), **more}


@contextmanager
def started(command: Sequence[str | Path], env: dict[str, str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone after the block, with its output in a file."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()


@contextmanager
def counting_worker(broker: Valkey, directory: Path) -> Iterator[CountingWorker]:
    output = directory / "worker.out"
    command = [sys.executable, "-m", "tests.integration.test_flower", DEVICE]
    app = make_app(broker.url())
    with started(command, environment(broker, directory / "home"), output) as process:
        worker = CountingWorker(process, output, app)
        worker.goes_on(999)
        yield worker
    app.close()


@contextmanager
def dashboard(env: dict[str, str], directory: Path, *arguments: str) -> Iterator[Dashboard]:
    output = directory / "flower.out"
    with started([FARM, "flower", "--port", "0", *arguments], env, output) as process:
        found = wait_for(
            lambda: re.search(r"^Flower is at (\S+),", output.read_text(), re.MULTILINE) or process.poll() is not None,
            30,
            "Flower is up",
        )
        assert process.poll() is None, output.read_text()
        yield Dashboard(process, output, found[1])


@pytest.fixture(scope="module")
def broker() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def worker(broker: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingWorker]:
    with counting_worker(broker, tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture(scope="module")
def flower(broker: Valkey, worker: CountingWorker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dashboard]:
    directory = tmp_path_factory.mktemp("flower")
    with dashboard(environment(broker, directory / "home"), directory) as flower:
        flower.shows("/workers", WORKER)
        yield flower


def test_flower_shows_the_worker_the_task_and_its_arguments(flower: Dashboard, worker: CountingWorker) -> None:
    worker.goes_on(1)
    flower.shows("/task/j1.s1.a1", "SUCCESS")
    _, page = flower.get("/task/j1.s1.a1")
    for text in (SHARD_TASK, WORKER, ARGUMENTS, "'won'"):
        assert text in page
    flower.shows(f"/worker/{WORKER}", queue_of(DEVICE))
    flower.shows("/broker", queue_of(DEVICE))


def test_flower_counts_a_failed_attempt_as_failed(flower: Dashboard, worker: CountingWorker) -> None:
    worker.goes_on(666)
    flower.shows("/task/j1.s1.a666", "FAILURE")
    assert "failed (crash)" in flower.get("/task/j1.s1.a666")[1]
    assert "Traceback" not in worker.said()


def test_the_password_of_the_broker_is_on_no_page(flower: Dashboard, worker: CountingWorker, broker: Valkey) -> None:
    worker.goes_on(1)
    flower.shows("/task/j1.s1.a1", ARGUMENTS)
    flower.shows(f"/worker/{WORKER}", "broker_url")  # the tab of the configuration is filled
    for path in PAGES:
        status, page = flower.get(path)
        assert status == 200, path
        assert broker.password not in page, path
    assert f":**@127.0.0.1:{broker.port}" in flower.get("/broker")[1]
    assert broker.password not in flower.said()


def test_metrics_and_the_brokers_memory_do_not_grow_with_shards(
    flower: Dashboard, worker: CountingWorker, broker: Valkey
) -> None:
    def series() -> set[str]:
        lines = flower.get("/metrics")[1].splitlines()
        return {line.rpartition(" ")[0] for line in lines if line.startswith("flower_")}

    def keys() -> set[str]:
        with broker.admin() as client:
            assert client.hlen("farm:unacked") == 0
            # The binding is of Flower's own questions, and there for no longer than they take.
            passing = ("unacked", "reply.celery.pidbox")
            return {str(key) for key in client.keys("*") if not any(name in str(key) for name in passing)}

    def acknowledged() -> bool:
        with broker.admin() as client:
            return client.hlen("farm:unacked") == 0 and client.llen(f"farm:{queue_of(DEVICE)}") == 0

    worker.goes_on(2)
    flower.shows("/metrics", f'type="task-succeeded",worker="{WORKER}"')
    flower.shows("/metrics", f'flower_worker_number_of_currently_executing_tasks{{worker="{WORKER}"}}')
    wait_for(acknowledged, 20, "all is acknowledged")
    series_before, keys_before = series(), keys()
    assert 10 < len(series_before) < 100
    assert 1 < len(keys_before) < 10

    for attempt_id in range(10_000, 11_000):
        worker.send(attempt_id)
    wait_for(lambda: 10_999 in worker.evaluated(), 90, "all are evaluated")
    flower.shows("/task/j1.s1.a10999", "SUCCESS")
    wait_for(acknowledged, 20, "all is acknowledged")
    assert set(range(10_000, 11_000)) <= set(worker.evaluated())
    assert series() == series_before
    assert keys() == keys_before


def test_with_a_password_nothing_is_shown_without_it(broker: Valkey, worker: CountingWorker, tmp_path: Path) -> None:
    auth = "reader:pa:ss word"
    env = environment(broker, tmp_path / "home", FARM_FLOWER_AUTH=auth)
    with dashboard(env, tmp_path, "--address", "0.0.0.0") as flower:
        flower.url = flower.url.replace("0.0.0.0", "127.0.0.1")
        flower.shows("/workers", WORKER, auth)
        flower.shows("/metrics", "flower_worker_online", auth)
        for path in (*PAGES, "/api/workers", "/api/tasks"):
            for wrong in ("", "reader:wrong", "other:pa:ss word", "reader:", "réader:pa:ss word"):
                status, page = flower.get(path, wrong)
                assert status in (401, 500), (path, wrong)  # 500: not ASCII, which Flower cannot compare
                assert WORKER not in page
        assert flower.get("/api/workers", auth)[0] == 200
        assert flower.get("/healthcheck") == (200, "OK")
        assert "pa:ss word" not in flower.said()
        assert "pa:ss word" not in Path(f"/proc/{flower.popen.pid}/cmdline").read_text()


def test_nobody_steers_the_farm_through_flower(broker: Valkey, worker: CountingWorker, tmp_path: Path) -> None:
    auth = "reader:secret"
    with dashboard(environment(broker, tmp_path / "home", FARM_FLOWER_AUTH=auth), tmp_path) as flower:
        flower.shows("/workers", WORKER, auth)
        for path in (
            f"/api/worker/shutdown/{WORKER}",
            f"/api/worker/pool/grow/{WORKER}?n=3",
            f"/api/worker/queue/cancel-consumer/{WORKER}?queue={queue_of(DEVICE)}",
            f"/api/task/send-task/{SHARD_TASK}",
            "/api/task/revoke/j1.s1.a1?terminate=true",
        ):
            assert flower.post(path, auth)[0] == 403, path
    worker.goes_on(3)


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "", "some.host"])
def test_listening_beyond_this_machine_without_a_password_is_refused(
    broker: Valkey, tmp_path: Path, address: str
) -> None:
    done = run(environment(broker, tmp_path), "--address", address)
    assert done.returncode == 2
    assert "FARM_FLOWER_AUTH=USER:PASSWORD" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("auth", ["user", "user:", ":secret", "us\u00e9r:secret"])
def test_a_password_that_cannot_be_is_refused_and_not_repeated(broker: Valkey, tmp_path: Path, auth: str) -> None:
    done = run(environment(broker, tmp_path, FARM_FLOWER_AUTH=auth))
    assert done.returncode == 2
    assert "FARM_FLOWER_AUTH" in done.stderr
    assert "secret" not in done.stderr


def test_a_port_that_is_taken_is_a_sentence(broker: Valkey, tmp_path: Path) -> None:
    done = run(environment(broker, tmp_path), "--port", str(broker.port))
    assert done.returncode == 2
    assert f"127.0.0.1:{broker.port}" in done.stderr
    assert "in use" in done.stderr


def test_without_a_farm_there_is_nothing_to_watch(tmp_path: Path) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("FARM_")}
    done = run({**env, "FARM_HOME": str(tmp_path)})
    assert done.returncode == 2
    assert "farm up" in done.stderr


def test_flower_outlives_its_broker_and_ends_when_told(tmp_path: Path) -> None:
    with Valkey() as broker, counting_worker(broker, tmp_path) as worker:
        with dashboard(environment(broker, tmp_path / "home"), tmp_path) as flower:
            flower.shows("/workers", WORKER)
            broker.kill()
            broker.wipe()
            assert flower.get("/broker")[0] == 200, "no queues, but a page"
            broker.start()
            worker.goes_on(1)

            def seen_again() -> bool:  # events of a moment ago may be lost, as Flower was not yet back
                worker.send(2)
                return flower.get("/task/j1.s1.a2")[0] == 200

            wait_for(seen_again, 60, f"Flower is back: {flower.said()[-2000:]}")
            broker.kill()
            flower.popen.send_signal(signal.SIGTERM)
            assert flower.popen.wait(20) == 0
        broker.start()  # for the worker to leave in good order
        assert broker.password not in flower.said() + worker.said()


def test_the_embedded_farm_is_shown_too(tmp_path: Path) -> None:
    farm = Farm(tmp_path / "a b%20", {"FARM_CPU_SLOTS": "1"})
    farm.run("up")
    try:
        with dashboard(farm.environment(), tmp_path) as flower:
            flower.shows("/workers", worker_name("localhost:0"))
            flower.shows("/worker/npu0@localhost", queue_of("localhost:0"))
            assert flower.get("/broker")[0] == 200
    finally:
        farm.run("down")
    wait_for(lambda: not farm.processes(), 6, "nothing is left")


def run(env: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FARM, "flower", *arguments], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def _count() -> None:
    """The process of a `CountingWorker`. Attempt 666 fails."""
    from tasks import worker
    from workers import broker

    class Counting:
        def evaluate(self, attempt_id: int) -> str:
            sys.stdout.write(f"evaluate {attempt_id}\n")
            sys.stdout.flush()
            return "failed (crash)" if attempt_id == 666 else "won"

    from farm.settings import load_settings

    counting: Any = Counting()
    worker.current = lambda: counting
    app = make_app(broker.url(load_settings()))
    app.conf.worker_redirect_stdouts = False
    app.Worker(
        hostname=worker_name(sys.argv[1]),
        queues=[queue_of(sys.argv[1])],
        pool="threads",
        concurrency=1,
        without_gossip=True,
        without_mingle=True,
        task_events=True,
        loglevel="INFO",
    ).start()


if __name__ == "__main__":
    _count()
