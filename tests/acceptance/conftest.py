"""The farm as a user has it: the installed command, real processes, a home of its own for every test."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import psutil
import pytest

FARM = Path(sys.executable).with_name("farm")


@dataclass
class Farm:
    """One FARM_HOME and what is run on it."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    command: tuple[Path | str, ...] = (FARM,)

    def environment(self) -> dict[str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("FARM_")}
        return {**clean, "FARM_HOME": str(self.home), "FARM_CPU_SLOTS": "2", **self.env}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *arguments],
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, code: int | None = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its exit code must be `code`."""
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"farm {' '.join(arguments)}: {done.stdout}{done.stderr}{self.logs()}"
        assert "Traceback" not in done.stderr
        return done

    def submit(
        self, *arguments: str, model: str = "lvvit", code: int | None = 0, timeout: float = 120
    ) -> dict[str, Any]:
        """The report of a job that was waited for."""
        report: dict[str, Any] = json.loads(
            self.run("submit", model, "--json", *arguments, code=code, timeout=timeout).stdout
        )
        return report

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json", code=None).stdout)

    def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.home / "farm.db", timeout=30) as connection:
            rows = connection.execute(query, values).fetchall()
        connection.close()
        return rows

    def processes(self) -> list[psutil.Process]:
        """Every process that belongs to this home, by its environment or its title (Valkey writes over the former)."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                mine = process.environ().get("FARM_HOME") == str(self.home) or str(self.home) in _title(process)
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def pids(self, text: str) -> list[int]:
        """Processes of this home whose command line has `text`."""
        return [process.pid for process in self.processes() if text in _title(process)]

    def logs(self) -> str:
        return "".join(f"\n--- {p.name}\n{p.read_text()[-3000:]}" for p in sorted((self.home / "log").glob("*.log")))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def wait_for(condition: Callable[[], Any], timeout: float = 30.0, what: str = "") -> Any:
    """The first true value of `condition`; fails with `what` when the time is over."""
    deadline = monotonic() + timeout
    while not (value := condition()):
        assert monotonic() < deadline, f"not within {timeout} s: {what}"
        sleep(0.05)
    return value


def assert_one_row_a_sample(farm: Farm, job: int, names: Sequence[str]) -> None:
    rows = farm.sql("SELECT name FROM result WHERE job_id = ? AND superseded = 0 ORDER BY name", job)
    assert [name for (name,) in rows] == sorted(names)


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    """A farm of two CPU slots; nothing of it may be left when the test is over."""
    farm = Farm(tmp_path / "home")
    yield farm
    try:
        wait_for(lambda: not farm.processes(), 6.0, f"processes end: {[_title(p) for p in farm.processes()]}")
        assert not list(farm.home.rglob("*.sock")), "a socket was left behind"
    finally:
        for process in farm.processes():
            process.send_signal(signal.SIGKILL)
