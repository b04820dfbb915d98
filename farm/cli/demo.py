"""``farm demo``: the main job on real photographs, by the commands a user types, with the right answer known before."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from farm.cli.arguments import batch_sizes
from farm.errors import FarmError, UsageError

if TYPE_CHECKING:
    from farm.demo.home import Home, Input, Outcome, Progress, Truth
    from farm.settings import Settings

#: Exit codes of a command after which there is something to compare.
DONE, WITH_ERRORS, DETACHED = 0, 3, 130

#: Without these the commands use what comes with the farm.
CONFIGURED = ("FARM_DATA", "FARM_BROKER_URL", "FARM_DATABASE_URL")

#: An interrupted submit takes its farm down first, which takes 3 s and more.
ENDS_WITHIN_S = 6.0


def demo(
    model: Annotated[str, typer.Option(help="One of farm models.")] = "lvvit",
    bs: Annotated[
        str | None, typer.Option(help="Batch size, or several: a job each; if not given 4, for segmentation 1.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(help="How many photographs; if not given 256, for segmentation 6.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, all else on stderr.")] = False,
) -> None:
    """
    Prepare, export and submit on real photographs, and compare with figures that are known beforehand.

    Works in FARM_HOME/demo/MODEL, a farm home of its own. Exit codes: 0 all is as expected, 1 it is not, 2 usage.

    farm demo --bs 1,4
    """
    from farm.demo import home_of
    from farm.settings import load_settings

    settings = load_settings()
    home = home_of(settings.home / "demo" / model, model)
    sizes = batch_sizes(str(home.bs) if bs is None else bs)
    photographs = _checked(home, count)
    shell = _Shell(home=home, out=sys.stderr if as_json else sys.stdout, env=_cpu_slots(settings))
    try:
        with home.claimed():
            made = _input(shell, photographs)
            jobs = _run(shell, sizes)
    except KeyboardInterrupt:
        print("stopped; farm demo starts over, with its input if that was complete", file=sys.stderr)
        raise
    expected = made.truth.outcome
    if as_json:
        print(json.dumps(_as_json(shell, made, jobs), indent=2))
    else:
        _show(shell, expected, jobs)
    if wrong := [f"{job} has {_difference(expected, job.outcome)}" for job in jobs if not job.outcome.agrees(expected)]:
        raise FarmError(
            f"the farm did not find what was planted: {'; '.join(wrong)}. Either {home.root} was altered or the farm "
            "is wrong: remove that directory and run farm demo again to see which."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A job that ran, and what it came to."""

    number: int
    bs: int
    outcome: Outcome
    digest: str | None

    def __str__(self) -> str:
        return f"job {self.number} (bs {self.bs})"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shell:
    """Runs the installed `farm` in the demo's home, and shows it as a terminal would."""

    home: Home
    out: TextIO
    env: Mapping[str, str]  #: of the commands, beside ours and FARM_HOME
    seconds: dict[str, float] = field(default_factory=dict)  #: by what took them

    def say(self, line: str = "") -> None:
        # At once: a command's own output follows.
        print(line, file=self.out, flush=True)

    def type(self, *arguments: str) -> None:
        """Run one command in sight; `FarmError` if it came to nothing."""
        self.say(f"\n$ {shlex.join(['farm', *arguments])}")
        with self.timed(arguments[0]):
            code = self._wait(self._start(arguments, self.out))
        if code not in (DONE, WITH_ERRORS):
            raise FarmError(f"farm {arguments[0]} {_ending(code)}: what it printed says why")

    def ask(self, *arguments: str) -> str:
        """What a command prints, out of sight."""
        # In a session of its own: nobody sees it, so a Ctrl-C is not meant for it.
        with self._start(arguments, subprocess.PIPE, start_new_session=True) as child:
            try:
                printed, _ = child.communicate()
            except KeyboardInterrupt:
                child.kill()
                raise
        if not printed:
            raise FarmError(f"farm {arguments[0]} {_ending(child.returncode)}: what it printed says why")
        return printed.decode()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = monotonic()
        yield
        self.seconds[what] = round(monotonic() - start, 3)

    def _start(
        self, arguments: Sequence[str], stdout: TextIO | int, *, start_new_session: bool = False
    ) -> subprocess.Popen[bytes]:
        # On a leash: killed by whatever means, the demo leaves no command behind.
        leash = [sys.executable, "-m", "farm.leash", str(os.getpid())]
        return subprocess.Popen(
            [*leash, _farm(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            cwd=self.home.root,
            env={**_unconfigured(os.environ), **self.env, "FARM_HOME": str(self.home.root)},
            start_new_session=start_new_session,
        )

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            _end(child)
            raise
        if code == DETACHED:
            raise KeyboardInterrupt
        return code


def _checked(home: Home, count: int | None) -> int:
    least, usual, most = home.counts
    if count is not None and not least <= count <= most:
        raise UsageError(f"--count {count}: expected {least} to {most} photographs for {home.model}")
    return usual if count is None else count


def _input(shell: _Shell, count: int) -> Input:
    shell.say(f"This demo lives in {shell.home.root}, a farm home of its own: nothing of it mixes with yours.")
    with shell.timed("input"), _bar() as progress:
        made = shell.home.input(count, progress)
    origin = "an earlier demo made them" if made.reused else f"made in {shell.seconds['input']:.0f} s"
    shell.say(
        f"Input: {count} photographs in {shell.home.layout} layout, seeded weights for {shell.home.model}, and "
        f"{shell.home.planted} planted by PyTorch ({origin})."
    )
    shell.say(f"Expected: {_in_words(shell.home, made.truth)}")
    return made


def _run(shell: _Shell, sizes: Sequence[int]) -> list[_Job]:
    """The commands of the main job, then each job's report."""
    home, listed = shell.home, ",".join(map(str, sizes))
    configured = [name for name in CONFIGURED if name in os.environ]
    shell.say(f"\n$ cd {shlex.quote(str(home.root))}\n$ export FARM_HOME=$PWD")
    for name, value in shell.env.items():
        shell.say(f"$ export {name}={value}")
    if configured:
        shell.say(f"$ unset {' '.join(configured)}")
    _cancel_interrupted(shell)
    shell.type("prepare", home.model, "--images", str(home.images), home.labels_option, str(home.labels))
    shell.type("export", home.model, "--weights", str(home.weights), "--bs", listed, *home.options)
    shell.type("submit", home.model, "--bs", listed, *home.options)
    numbers = sorted(job["job"] for job in json.loads(shell.ask("jobs", "--limit", str(len(sizes)), "--json")))
    reports = [json.loads(shell.ask("report", str(number), "--json")) for number in numbers]
    return [
        _Job(number=report["job"], bs=report["bs"], outcome=home.measured(report), digest=report["digest"])
        for report in reports
    ]


def _cancel_interrupted(shell: _Shell) -> None:
    """An earlier demo's unfinished jobs, which any farm that comes up would go on with."""
    for job in json.loads(shell.ask("jobs", "--json")):
        if job["state"] in ("pending", "running"):
            shell.ask("cancel", str(job["job"]))


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress callback that draws a bar on stderr, or says once what takes so long if that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = TextColumn("scoring in PyTorch"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(done: int, total: int) -> None:
            if bar.disable and not bar.tasks[task].completed:
                print(f"scoring {total} photographs in PyTorch", file=sys.stderr)
            bar.update(task, completed=done, total=total, visible=True)

        yield show


def _farm() -> str:
    """The command of this installation, whatever PATH says."""
    command = Path(sys.executable).with_name("farm")
    if not command.is_file():
        raise FarmError(f"there is no farm command beside {sys.executable}: install the farm into this Python again")
    return str(command)


def _cpu_slots(settings: Settings) -> dict[str, str]:
    """The demo's network runs on CPUs, on a host with NPUs, too."""
    from workers.devices import is_npu_host

    return {"FARM_CPU_SLOTS": str(settings.cpu_slots)} if is_npu_host(settings) else {}


def _unconfigured(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in CONFIGURED}


def _end(child: subprocess.Popen[bytes]) -> None:
    """Wait for an interrupted command to clean up."""
    # Ctrl-C reached it as well; a signal sent to this process alone did not.
    for last in (None, signal.SIGINT, signal.SIGKILL):
        if last:
            child.send_signal(last)
        try:
            child.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            continue
        return


def _ending(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _in_words(home: Home, truth: Truth) -> str:
    metrics = ", ".join(f"{figure.name} {figure.shown}" for figure in truth.outcome.metrics())
    return f"{metrics}; {home.favourite} {100 * truth.favourite_share:.1f} %."


def _difference(expected: Outcome, measured: Outcome) -> str:
    pairs = zip(expected.figures(), measured.figures(), strict=True)
    return ", ".join(
        f"{wanted.name} {found.shown} instead of {wanted.shown}" for wanted, found in pairs if not found.agrees(wanted)
    )


def _show(shell: _Shell, expected: Outcome, jobs: Sequence[_Job]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None, pad_edge=False)
    for title in ("expected", *map(str, jobs)):
        table.add_column(title, justify="right")
    for wanted, *measured in zip(expected.figures(), *(job.outcome.figures() for job in jobs), strict=True):
        cells = (f.shown if f.agrees(wanted) else f"[bold red]{f.shown} differs[/]" for f in measured)
        table.add_row(wanted.name, wanted.shown, *cells)
    shell.say()
    Console(file=shell.out).print(table)
    took = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in shell.seconds.items())
    if all(job.outcome.agrees(expected) for job in jobs):
        shell.say(f"Equal: the farm found what was planted ({took}).")


def _as_json(shell: _Shell, made: Input, jobs: Sequence[_Job]) -> dict[str, Any]:
    truth, expected = made.truth, made.truth.outcome
    return {
        "schema": 1,
        "home": str(shell.home.root),
        "input": {**truth.key.model_dump(), "reused": made.reused, "favourite_share": truth.favourite_share},
        "expected": expected.as_json(),
        "jobs": [
            {
                "job": job.number,
                "bs": job.bs,
                "measured": job.outcome.as_json(),
                "equal": job.outcome.agrees(expected),
                "digest": job.digest,
            }
            for job in jobs
        ],
        "equal": all(job.outcome.agrees(expected) for job in jobs),
        "seconds": shell.seconds,
    }
