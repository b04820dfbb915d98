"""What a broker that others reach too may be asked for, and what it may make of the farm."""

from __future__ import annotations

import re
import signal
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis

from farm.errors import UsageError
from tasks.app import SHARD_TASK, make_app, queue_of
from tests.acceptance.conftest import Farm, wait_for
from tests.datasets import write_bins
from tests.integration.test_flower import DEVICE, WORKER, CountingWorker, counting_worker, dashboard
from tests.servers import Server, Valkey
from workers.broker import server_binary

SECRET = "s3cr3t-of-the-broker"

_numbers = count(100)


@pytest.fixture(scope="module")
def broker() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def worker(broker: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CountingWorker]:
    with counting_worker(broker, tmp_path_factory.mktemp("worker")) as worker:
        yield worker


@pytest.fixture
def limited(broker: Valkey) -> Iterator[redis.Redis]:
    """A client as the farm's user."""
    client = redis.Redis.from_url(broker.url(), protocol=2)
    yield client
    client.close()


class _Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, (str(self.path), "w")


def test_a_pickle_is_refused_and_the_worker_goes_on(worker: CountingWorker, tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    worker.app.send_task(SHARD_TASK, args=[1, _Trap(trap)], queue=queue_of(DEVICE), serializer="pickle", argsrepr="")
    wait_for(lambda: "Refusing to deserialize" in worker.said(), 20, "the worker says so")
    worker.goes_on(1)
    assert not trap.exists()


def test_an_unknown_task_is_refused_and_the_worker_goes_on(worker: CountingWorker) -> None:
    worker.app.send_task("os.system", args=["true"], queue=queue_of(DEVICE))
    wait_for(lambda: "unregistered task of type 'os.system'" in worker.said(), 20, "the worker says so")
    worker.goes_on(2)


@pytest.mark.parametrize(
    "args",
    [
        (1, "7"),
        ("1; DROP TABLE shard", 7),
        (1, -7),
        (0, 7),
        (1, 2**63),
        (10**4000, 7),
        (1, 7.0),
        (True, 7),
        (None, 7),
        (1, [7]),
        ({"id": 1}, 7),
        (7,),
        (),
        (1, 7, 7),
    ],
    ids=lambda args: f"{args!r:.30}",
)
def test_arguments_that_are_no_ids_are_refused_and_the_worker_goes_on(
    worker: CountingWorker, args: tuple[Any, ...]
) -> None:
    before = len(worker.evaluated())
    worker.app.send_task(SHARD_TASK, args=args, queue=queue_of(DEVICE), argsrepr="")
    worker.goes_on(next(_numbers))
    assert len(worker.evaluated()) == before + 1
    assert len(worker.said()) < 100_000, "nothing long was repeated"


@pytest.mark.parametrize(
    "command",
    [
        "CONFIG GET *",
        "CONFIG SET dir /tmp",
        "FLUSHALL",
        "FLUSHDB",
        "KEYS *",
        "SHUTDOWN",
        "SAVE",
        "ACL LIST",
        "MONITOR",
        "REPLICAOF 127.0.0.1 1",
        "MODULE LIST",
        "CLIENT LIST",
        "SET other:key 1",
        "GET other:key",
        "SUBSCRIBE other",
        "EVAL return(redis.call('get','other:key')) 0",
    ],
)
def test_the_farms_user_can_do_nothing_else_on_the_broker(limited: redis.Redis, command: str) -> None:
    assert limited.ping()
    with pytest.raises(redis.exceptions.RedisError, match=r"(?i)no.?perm"):
        _ask(limited, *command.split())


def test_a_broker_that_forgot_everything_is_sent_to_and_listened_to_as_before(
    worker: CountingWorker, broker: Valkey
) -> None:
    worker.goes_on(20)
    for attempt_id in range(21, 26):
        broker.flushall()  # workers and senders stay connected, and believe that it knows their queues
        worker.goes_on(attempt_id)
        broker.flushall()
        assert worker.app.control.inspect([WORKER], timeout=5).ping() == {WORKER: {"ok": "pong"}}


def test_a_farm_works_under_these_rules_and_its_secrets_are_nowhere(postgres_url: str, tmp_path: Path) -> None:
    with Valkey(password=SECRET) as broker:
        farm = Farm(tmp_path / "home", {"FARM_BROKER_URL": broker.url(), "FARM_DATABASE_URL": postgres_url})
        farm.env |= {"FARM_HOST": "rack-7", "FARM_SIMULATED": '{"compute_ms": 100}'}
        write_bins(farm.home / "data", 40)
        with (
            running(farm, "coordinator", tmp_path),
            running(farm, "worker", tmp_path),
            dashboard(farm.environment(), tmp_path) as flower,
        ):
            flower.shows("/workers", "npu0@rack-7")
            assert farm.submit("--bs", "4", "--backend", "simulated")["state"] == "done"

            app = make_app(broker.url())
            for args in ((10**6, 10**6), (2**63 - 1, 2**63 - 1), (1, "1"), (1, 1)):  # unknown twice, no id, over
                app.send_task(SHARD_TASK, args=args, queue=queue_of("rack-7:0"))
            app.send_task(SHARD_TASK, args=(1, 1), queue=queue_of("rack-7:0"), serializer="pickle")
            app.close()
            farm.run("submit", "lvvit", "--bs", "4", "--backend", "simulated", "--devices", "rack-7:0", "--no-wait")
            with broker.admin() as admin:  # what no sender of Celery's sends ends a worker, and the next one starts
                admin.lpush(f"farm:{queue_of('rack-7:0')}", b"\x80 not json")
            assert farm.json("wait", "2")["samples"] == {"total": 40, "scored": 40, "failed": 0}
            wait_for(lambda: _incarnation(farm, "rack-7:0") == 2, 60, "another worker of the device")
            flower.shows("/task/j2.s0.a1", "SUCCESS")

            pages = [flower.get(path)[1] for path in ("/workers", "/worker/npu0@rack-7", "/broker", "/task/j2.s0.a1")]
            assert "broker_url" in pages[1]
            doctor = farm.run("doctor", code=None)
            titles = " ".join(word for process in psutil.process_iter() for word in _title(process))
            assert "tasks.worker" in titles
        database_password = re.findall(r":([^:@]+)@", postgres_url)[0]
        written = [file.read_text(errors="replace") for file in _texts(tmp_path)]
        assert len(written) > 3, "logs were written"
        for text in (*pages, doctor.stdout, doctor.stderr, titles, *written):
            assert SECRET not in text
            assert database_password not in text


def _ask(client: Any, *command: str) -> object:  # redis-py gives this method no types
    return client.execute_command(*command)


@contextmanager
def running(farm: Farm, command: str, directory: Path) -> Iterator[None]:
    """A service of the farm, ended with SIGTERM after the block."""
    output = directory / f"{command}.out"
    with output.open("wb") as file:
        process = subprocess.Popen([*farm.command, command], env=farm.environment(), stdout=file, stderr=file)
    try:
        yield
        process.terminate()
        assert process.wait(60) == 0, output.read_text()
    finally:
        process.kill()
        process.wait()


def _incarnation(farm: Farm, device: str) -> int:
    (found,) = [line["incarnation"] for line in farm.json("devices") if line["device"] == device]
    return int(found)


def _title(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def _texts(directory: Path) -> list[Path]:
    return [*directory.glob("*.out"), *directory.rglob("*.log")]


class Sentinel(Server):
    """Watches a Valkey under the name `farm`."""

    _stop_signal = signal.SIGTERM

    def __init__(self, watched: Valkey) -> None:
        super().__init__()
        self.watched = watched

    def url(self) -> str:
        user = self.watched.url().partition("//")[2].partition("@")[0]
        return f"sentinel://{user}@127.0.0.1:{self.port}/0?master_name=farm"

    def _command(self) -> list[str]:
        config = self.directory / "sentinel.conf"
        config.write_text(
            f"bind 127.0.0.1\nport {self.port}\ndir {self.directory}\n"
            f"sentinel monitor farm 127.0.0.1 {self.watched.port} 1\n"
            f"sentinel auth-user farm admin\nsentinel auth-pass farm {self.watched.admin_password}\n"
        )
        return [server_binary(), str(config), "--sentinel"]

    def _answers(self) -> bool:
        client = redis.Redis(port=self.port, protocol=2)
        try:
            return _ask(client, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "farm") is not None
        except redis.RedisError:
            return False
        finally:
            client.close()


def test_sentinels_are_asked_for_the_broker(worker: CountingWorker, broker: Valkey) -> None:
    with Sentinel(broker) as sentinel:
        second = "sentinel://127.0.0.1:1"  # nobody is there
        for url in (sentinel.url(), sentinel.url().replace("?", f";{second}?")):
            app = make_app(url)
            app.send_task(SHARD_TASK, args=[1, 31], queue=queue_of(DEVICE))
            app.close()
        wait_for(lambda: worker.evaluated().count(31) == 2, 20, "both arrive")


@pytest.mark.parametrize(
    "url",
    [
        f"amqp://farm:{SECRET}@host/0",
        f"farm:{SECRET}@host:6379",
        f"redis://farm:{SECRET}@:6379/0",
        f"redis://farm:{SECRET}@host:0/0",
        f"redis://farm:{SECRET}@host:port/0",
        f"redis://farm:{SECRET}@host:99999/0",
        f"redis://farm:x/{SECRET}@host/0",
        f"redis://farm:1/{SECRET}@host/0",
        f"redis://farm:1?{SECRET}@host/0",
        f"redis://farm:1#{SECRET}@host/0",
        f"redis://farm:[{SECRET}@host/0",
        f"redis://farm:{SECRET}@host/jobs",
        f"redis://farm:{SECRET}@one/0;redis://farm:{SECRET}@two/0",
        f"redis://host/0?password={SECRET}",
        f"redis://farm:{SECRET}@host/0?ssl_cert_reqs=required",
        f"rediss://farm:{SECRET}@host/0?ssl_cert_reqs=perhaps",
        f"rediss://farm:{SECRET}@host/0?ssl_ca_certs=/no/such/file",
        f"sentinel://farm:{SECRET}@host:26379/0",
        f"sentinel://farm:{SECRET}@host:26379/0;redis://two/0?master_name=farm",
        f"redis+socket://farm:{SECRET}@host",
        "redis+socket:///",
        "redis://",
    ],
)
def test_a_url_that_names_no_broker_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError, match="FARM_BROKER_URL cannot be used") as caught:
        make_app(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host:6379/0",
        "redis://farm:p%2Fw%3B%40@[::1]:6379/2",
        "redis+socket:///run/a%20b/broker.sock",
        "redis+socket:///run/broker.sock?virtual_host=1",
        "sentinel://farm:pw@one:26379/0;sentinel://two:26379/0?master_name=farm",
    ],
)
def test_what_celery_is_told_is_what_the_url_says(url: str) -> None:
    conf = make_app(url).conf
    assert conf.broker_url == url.replace("?master_name=farm", "")
    assert conf.broker_transport_options.get("master_name") == ("farm" if "sentinel" in url else None)
    assert conf.broker_transport_options["global_keyprefix"] == "farm:"
    assert not conf.broker_use_ssl


def test_certificates_are_checked_unless_the_url_says_otherwise(tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.touch()
    for query, reqs in (("", ssl.CERT_REQUIRED), ("&ssl_cert_reqs=none", ssl.CERT_NONE)):
        with make_app(f"rediss://farm:pw@host:6380/0?ssl_ca_certs={authority}{query}").connection() as connection:
            assert connection.transport_cls == "rediss"
            assert (connection.hostname, connection.port, connection.password) == ("host", 6380, "pw")
            assert connection.ssl == {"ssl_ca_certs": str(authority), "ssl_cert_reqs": reqs}
