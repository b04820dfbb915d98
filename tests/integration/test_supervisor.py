"""Real children: killed, stubborn, orphaned. Back-off goes by a clock of the test's own."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integration.test_pipeline import eventually, runs
from workers import supervisor
from workers.supervisor import Child


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor, "monotonic", clock)
    return clock


@contextmanager
def supervised(tmp_path: Path, script: str = "while :; do sleep 0.05; done", **env: str) -> Iterator[Child]:
    """A shell script kept running; the end of the block ends it."""
    child = Child(name="child", command=["/bin/sh", "-c", script], log_file=tmp_path / "child.log", env=env)
    try:
        child.watch()
        yield child
    finally:
        supervisor.stop([child], 0.0)


def log_of(tmp_path: Path) -> str:
    return (tmp_path / "child.log").read_text()


def kill(child: Child) -> int:
    """SIGKILL for the child; the answer is which process that was."""
    pid = child.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: child.pid is None)
    return pid


def pid_after_a_watch(child: Child) -> int | None:
    child.watch()
    return child.pid


def delays(caplog: pytest.LogCaptureFixture) -> list[float]:
    """After how many seconds the next start was announced, each time."""
    return [float(seconds) for seconds in re.findall(r"next start in ([\d.]+) s", caplog.text)]


def test_a_child_runs_its_command_and_its_output_goes_to_the_log(tmp_path: Path) -> None:
    with supervised(tmp_path, "echo out; echo err >&2; sleep 60"):
        assert eventually(lambda: log_of(tmp_path) == "out\nerr\n")


def test_a_child_has_the_environment_it_was_given_beside_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    with supervised(tmp_path, "echo $OURS $THEIRS; sleep 60", THEIRS="2"):
        assert eventually(lambda: log_of(tmp_path) == "1 2\n")


def test_a_child_does_not_hear_the_terminals_interrupt(tmp_path: Path) -> None:
    with supervised(tmp_path) as child:
        assert child.pid is not None
        assert os.getpgid(child.pid) != os.getpgid(0)


def test_a_child_that_runs_is_left_alone(tmp_path: Path) -> None:
    with supervised(tmp_path) as child:
        before = child.pid

        child.watch()

        assert child.pid == before


def test_a_killed_child_is_started_again(tmp_path: Path) -> None:
    with supervised(tmp_path) as child:
        before = kill(child)

        assert eventually(lambda: pid_after_a_watch(child) not in (None, before))


def test_a_killed_child_is_not_started_before_its_back_off_is_over(tmp_path: Path, clock: Clock) -> None:
    with supervised(tmp_path) as child:
        kill(child)
        child.watch()

        clock.now += supervisor.FIRST_DELAY_S * 0.9
        child.watch()

        assert child.pid is None


def test_a_killed_child_is_started_once_its_back_off_is_over(tmp_path: Path, clock: Clock) -> None:
    with supervised(tmp_path) as child:
        kill(child)
        child.watch()

        clock.now += supervisor.FIRST_DELAY_S * 2.1
        child.watch()

        assert child.pid is not None


def test_the_log_of_the_life_before_is_kept(tmp_path: Path, clock: Clock) -> None:
    with supervised(tmp_path, "echo alive; sleep 60") as child:
        assert eventually(lambda: log_of(tmp_path) == "alive\n")
        kill(child)
        child.watch()
        clock.now += supervisor.LONGEST_DELAY_S
        child.watch()

        assert eventually(lambda: log_of(tmp_path) == "alive\nalive\n")


def test_the_back_off_doubles_up_to_its_longest(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with supervised(tmp_path, "exit 1") as child, caplog.at_level(logging.WARNING):
        for _ in range(8):
            assert eventually(lambda: child.pid is None)
            child.watch()
            clock.now += supervisor.LONGEST_DELAY_S
            child.watch()
            clock.now -= supervisor.LONGEST_DELAY_S  # the lives themselves take no time

    announced = delays(caplog)
    assert announced == [min(announced[0] * 2**n, supervisor.LONGEST_DELAY_S) for n in range(8)]
    assert announced[-1] == supervisor.LONGEST_DELAY_S


def test_a_child_that_lived_long_is_soon_started_again(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with supervised(tmp_path) as child, caplog.at_level(logging.WARNING):
        for lifetime in (0.0, 0.0, supervisor.STEADY_S + 1):
            clock.now += lifetime
            kill(child)
            child.watch()
            clock.now += supervisor.LONGEST_DELAY_S
            child.watch()

    assert delays(caplog)[-1] == supervisor.FIRST_DELAY_S


def test_a_command_that_is_not_there_is_named_in_the_log(tmp_path: Path) -> None:
    child = Child(name="child", command=["/no/such/program"], log_file=tmp_path / "child.log")

    child.watch()

    assert eventually(lambda: child.pid is None)
    assert "FileNotFoundError" in log_of(tmp_path)


def test_a_child_that_ends_at_once_is_quoted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with supervised(tmp_path, "echo first; echo the port is taken; exit 2") as child:
        assert eventually(lambda: child.pid is None)
        child.watch()

    assert "child ended (2: the port is taken); next start" in caplog.text


def test_stopping_lets_a_child_end_in_its_own_way(tmp_path: Path) -> None:
    with supervised(tmp_path, "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done") as child:
        assert eventually(lambda: log_of(tmp_path) == "up\n")

        supervisor.stop([child], 30.0)

        assert log_of(tmp_path) == "up\nbye\n"
        assert child.pid is None


def test_stopping_kills_a_child_that_does_not_listen(tmp_path: Path) -> None:
    with supervised(tmp_path, "trap '' TERM; echo up; while :; do sleep 0.05; done") as child:
        assert eventually(lambda: log_of(tmp_path) == "up\n")

        supervisor.stop([child], 0.2)

        assert child.pid is None


def test_stopping_tells_all_children_before_it_waits_for_one(tmp_path: Path) -> None:
    """The first one ends only after the second."""
    first = f"trap 'while [ ! -e {tmp_path}/ended ]; do sleep 0.01; done; echo last; exit' TERM; echo up; "
    second = f"trap 'touch {tmp_path}/ended; exit' TERM; echo up; "
    (tmp_path / "other").mkdir()
    with (
        supervised(tmp_path, first + "while :; do sleep 0.01; done") as one,
        supervised(tmp_path / "other", second + "while :; do sleep 0.01; done") as other,
    ):
        assert eventually(lambda: log_of(tmp_path) + log_of(tmp_path / "other") == "up\nup\n")

        supervisor.stop([one, other], 30.0)

        assert log_of(tmp_path) == "up\nlast\n"


def test_stopping_a_child_that_never_ran_is_harmless(tmp_path: Path) -> None:
    supervisor.stop([Child(name="child", command=["/bin/true"], log_file=tmp_path / "child.log")], 1.0)


def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    with supervised(tmp_path) as child:
        supervisor.stop([child], 30.0)

        supervisor.stop([child], 30.0)

        assert child.pid is None


#: A supervisor of one child that does not listen; it says which process that is.
PARENT = """
import sys, time
from pathlib import Path
from workers.supervisor import Child

command = ["/bin/sh", "-c", "trap '' TERM HUP; echo up; while :; do sleep 0.05; done"]
child = Child(name="child", command=command, log_file=Path(sys.argv[1]))
child.watch()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("at_once", [True, False], ids=["while it starts", "while it runs"])
def test_a_child_dies_with_its_killed_parent(tmp_path: Path, at_once: bool) -> None:
    log = tmp_path / "child.log"
    with subprocess.Popen([sys.executable, "-c", PARENT, log], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert at_once or eventually(lambda: log.read_text() == "up\n")
        assert runs(child)

        parent.kill()

    assert eventually(lambda: not runs(child), timeout_s=5.0)
