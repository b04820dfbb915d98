"""
`farm demo` as a user runs it: real photographs, the official network, real processes, and an answer known before.

One demo's home serves the whole file, since its input is what takes long. What tampers works on a copy, or repairs.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from farm.data import manifest
from farm.demo.classification import Outcome, Truth
from tests.acceptance.conftest import Farm, wait_for

COUNT = 48
LABELS = Path("ILSVRC2012/val_label.txt")
BINS = Path("data/bins/lvvit-float32")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A home in which a demo ran once, at batch sizes 1 and 4."""

    outer: Farm  #: where `farm demo` is run
    inner: Farm  #: the farm home it made
    printed: str
    talked: str

    @property
    def expected(self) -> Outcome:
        return Truth.model_validate_json((self.inner.home / "expected.json").read_bytes()).outcome

    def again(self, *arguments: str, code: int = 0, env: dict[str, str] | None = None) -> tuple[str, str]:
        """stdout and stderr of another demo on the same input."""
        done = Farm(self.outer.home, env=env or {}).run("demo", "--count", str(COUNT), *arguments, code=code)
        return done.stdout, done.stderr

    def last_report(self) -> dict[str, Any]:
        (newest, *_) = self.inner.json("jobs")
        report: dict[str, Any] = self.inner.json("report", str(newest["job"]))
        return report


def processes_of(home: Path) -> list[str]:
    """Command lines of whatever has to do with a home, by its command line, environment or directory."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values(), process.cwd()]
            if process.status() != psutil.STATUS_ZOMBIE and any(str(home) in word for word in words):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    outer = Farm(tmp_path_factory.mktemp("demo") / "home")
    done = outer.run("demo", "--count", str(COUNT), "--bs", "1,4", timeout=240)
    return Demo(outer=outer, inner=Farm(outer.home / "demo" / "lvvit"), printed=done.stdout, talked=done.stderr)


@pytest.fixture(autouse=True)
def nothing_is_left(demo: Demo) -> Iterator[None]:
    yield
    wait_for(lambda: not processes_of(demo.outer.home), 6.0, f"processes end: {processes_of(demo.outer.home)}")


@pytest.fixture
def copy(demo: Demo, tmp_path: Path) -> Farm:
    """A farm with the demo's artifacts and a copy of its bins, to be tampered with."""
    home = tmp_path / "home"
    shutil.copytree(demo.inner.home / BINS, home / BINS)
    (home / "data" / "artifacts").symlink_to(demo.inner.home / "data" / "artifacts")
    return Farm(home)


@contextmanager
def labelled(demo: Demo, text: str) -> Iterator[None]:
    """Other labels for a while; the manifest has the right ones again afterwards."""
    path = demo.inner.home / LABELS
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)
        demo.inner.run("prepare", "lvvit", "--images", str(path.parent / "images"), "--labels", str(path))


def two_right_and_different(demo: Demo) -> tuple[str, str]:
    """Names of two samples whose labels are their top-1 and differ."""
    rows = demo.inner.sql("SELECT name, label FROM result WHERE job_id = 2 AND rank = 1 ORDER BY name")
    first, label = rows[0]
    return first, next(name for name, other in rows if other != label)


def swap_bins(farm: Farm, first: str, second: str) -> None:
    one, other = (manifest.bin_path(farm.home / BINS, name) for name in (first, second))
    aside = one.with_suffix(".aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_hashes(farm: Farm, first: str, second: str) -> None:
    """Have the manifest vouch for two bins that have changed places."""
    directory = farm.home / BINS
    written = manifest.read(directory)
    hashes = {sample.name: sample.xxh3 for sample in written.samples}
    hashes[first], hashes[second] = hashes[second], hashes[first]
    manifest.write(directory, written.header, [s._replace(xxh3=hashes[s.name]) for s in written.samples])


def test_measured_equals_expected_at_both_batch_sizes(demo: Demo) -> None:
    expected = demo.expected
    table = demo.printed[demo.printed.rindex("expected  ") :]
    for name, figure in (
        ("top-1", f"{expected.top1:.3f} % ({expected.top1_correct})"),
        ("top-5", f"{expected.top5:.3f} % ({expected.top5_correct})"),
        ("scored", str(COUNT)),
        ("failed", "0"),
    ):
        (line,) = [line for line in table.splitlines() if line.startswith(name)]
        assert line.split() == [name, *3 * figure.split()]
    assert "job 1 (bs 1)" in table
    assert "job 2 (bs 4)" in table
    assert "Equal: the farm found what was planted" in table


def test_it_types_what_a_user_would(demo: Demo) -> None:
    typed = [line.removeprefix("$ ") for line in demo.printed.splitlines() if line.startswith("$ ")]
    assert typed == [
        f"cd {demo.inner.home}",
        "export FARM_HOME=$PWD",
        "farm prepare lvvit --images ILSVRC2012/images --labels ILSVRC2012/val_label.txt",
        "farm export lvvit --weights lvvit-seeded.pth --bs 1,4",
        "farm submit lvvit --bs 1,4",
    ]


def test_both_devices_took_part_and_the_reports_say_so(demo: Demo) -> None:
    for job, bs in ((1, 1), (2, 4)):
        report = demo.inner.json("report", str(job))
        assert (report["state"], report["bs"]) == ("done", bs)
        assert {line["device"] for line in report["devices"]} == {"localhost:0", "localhost:1"}
        assert Outcome.of(report) == demo.expected


def test_a_second_demo_reuses_the_input_and_needs_no_path_and_no_configuration(demo: Demo) -> None:
    truth = demo.inner.home / "expected.json"
    before = truth.stat().st_mtime_ns

    configured = {"FARM_BROKER_URL": "redis://127.0.0.1:1/0", "FARM_DATA": "/nonexistent", "PATH": "/nonexistent"}
    printed, talked = demo.again("--bs", "4", "--json", env=configured)

    result = json.loads(printed)
    assert result["input"]["reused"]
    assert truth.stat().st_mtime_ns == before
    assert result["expected"] == demo.expected.as_json()
    assert [(job["bs"], job["measured"], job["equal"]) for job in result["jobs"]] == [(4, result["expected"], True)]
    assert result["equal"]
    assert "$ unset FARM_DATA FARM_BROKER_URL" in talked
    assert "$ farm submit lvvit --bs 4" in talked


def test_labels_shifted_by_one_line_are_found_out(demo: Demo) -> None:
    lines = (demo.inner.home / LABELS).read_text().splitlines()
    names, labels = zip(*(line.split() for line in lines), strict=True)
    shifted = zip(names, [*labels[1:], labels[0]], strict=True)

    with labelled(demo, "".join(f"{name} {label}\n" for name, label in shifted)):
        printed, talked = demo.again("--bs", "4", code=1)

    measured = Outcome.of(demo.last_report())
    assert measured.top1_correct < demo.expected.top1_correct / 2
    assert f"{measured.top1:.3f} % ({measured.top1_correct}) differs" in printed
    assert "Equal" not in printed
    assert "error: the farm did not find what was planted: job " in talked
    assert "remove that directory" in talked


def test_two_samples_in_each_others_place_cost_two_right_answers(demo: Demo, copy: Farm) -> None:
    first, second = two_right_and_different(demo)
    swap_bins(copy, first, second)
    swap_hashes(copy, first, second)

    measured = Outcome.of(copy.submit("--bs", "4"))

    assert measured.top1_correct == demo.expected.top1_correct - 2
    assert (measured.scored, measured.failed) == (COUNT, 0)


def test_two_bins_in_each_others_place_are_failed_by_name(demo: Demo, copy: Farm) -> None:
    first, second = two_right_and_different(demo)
    swap_bins(copy, first, second)

    report = copy.submit("--bs", "4", code=3)

    assert report["state"] == "done_with_errors"
    assert [sample["name"] for sample in report["failed"]] == [first, second]
    assert all("was altered" in sample["reason"] for sample in report["failed"])
    measured = Outcome.of(report)
    assert (measured.scored, measured.failed) == (COUNT - 2, 2)
    assert measured.top1_correct == demo.expected.top1_correct - 2, "left out, and not counted as wrong"


def test_one_device_gives_the_digest_that_two_gave(demo: Demo, copy: Farm) -> None:
    one = copy.submit("--bs", "4", "--devices", "localhost:0")

    assert {line["device"] for line in one["devices"]} == {"localhost:0"}
    assert one["digest"] == demo.inner.json("report", "2")["digest"]
    assert Outcome.of(one) == demo.expected


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)], ids=["ctrl-c", "killed"]
)
def test_a_demo_that_is_stopped_leaves_no_process(demo: Demo, sent: signal.Signals, code: int) -> None:
    (jobs_before,) = demo.inner.sql("SELECT max(id) FROM job")[0]
    command = demo.outer.start("demo", "--count", str(COUNT), "--bs", "4")
    query = "SELECT count(*) FROM attempt WHERE job_id > ? AND state = 'won'"
    wait_for(lambda: demo.inner.sql(query, jobs_before)[0][0], 60, "the demo's job is under way")

    if sent == signal.SIGINT:
        os.killpg(command.pid, sent)  # as a terminal does
    else:
        command.send_signal(sent)
    printed, talked = command.communicate(timeout=30)

    assert command.returncode == code, talked
    wait_for(lambda: not processes_of(demo.outer.home), 1.0 if sent == signal.SIGINT else 5.0, "all processes end")
    assert "Equal" not in printed
    assert "Traceback" not in talked


def test_the_next_demo_cancels_what_a_stopped_one_left(demo: Demo) -> None:
    demo.inner.run("submit", "lvvit", "--bs", "4", "--no-wait")

    demo.again("--bs", "4")

    states = [job["state"] for job in demo.inner.json("jobs")]
    assert states[:2] == ["done", "cancelled"]
    assert "pending" not in states
    assert "running" not in states


def test_a_demo_beside_another_is_refused(demo: Demo) -> None:
    with (demo.inner.home / "demo.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _, talked = demo.again(code=2)

    assert f"another farm demo is at work in {demo.inner.home}" in talked


@pytest.mark.parametrize(
    ("package", "source", "sentence"),
    [
        ("torch", "raise ImportError('none here')", 'Install it: pip install "torch>=2.6"'),
        ("skimage", "", "the demo's pictures come from scikit-image, which is not here: pip install"),
    ],
)
def test_a_missing_package_is_answered_with_the_line_to_type(
    package: str, source: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(source)

    done = Farm(tmp_path / "home", env={"PYTHONPATH": str(tmp_path)}).run("demo", code=2)

    assert sentence in done.stderr
