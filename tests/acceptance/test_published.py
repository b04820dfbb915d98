"""From a job to the published scripts' files and back: what they make of them is what the farm reports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from db.engine import Database, open_database
from farm.data import manifest
from farm.data.manifest import Header, Manifest, Sample, Windows
from farm.data.recipes import SEG
from farm.data.slide import Size
from farm.errors import UsageError
from farm.reports import outputs, published
from farm.reports.ingest import ingest
from farm.reports.report import build
from farm.reports.rescore import rescore
from farm.settings import Settings
from tasks.submission import Request, plan, submit
from tests.acceptance.conftest import Farm, wait_for
from tests.cluster import simulated_digest
from tests.datasets import name_of, write_bins

COUNT = 62


@dataclass(frozen=True)
class Done:
    """Job 1 of a farm that is down again: it kept its raw outputs."""

    farm: Farm
    settings: Settings
    database: Database
    data: Manifest
    kept: Path

    @property
    def report(self) -> dict[str, Any]:
        return build(self.database, 1)

    def results(self, folder: Path, form: str = "BIN") -> outputs.Written:
        return outputs.write(self.database, self.settings, 1, form, folder)

    def ingest(self, folder: Path) -> dict[str, Any]:
        return ingest(self.settings, "lvvit", folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A worker was killed meanwhile."""
    slow = json.dumps({"compute_ms": 250})
    farm = Farm(tmp_path_factory.mktemp("published") / "home", {"FARM_SIMULATED": slow, "FARM_SHARD_S": "0.4"})
    data = write_bins(farm.home / "data", COUNT)
    command = farm.start("submit", "lvvit", "--bs", "4", "--backend", "simulated", "--keep-logits", "--json")
    try:
        wait_for(lambda: _works(farm), 60, "a worker has kept some outputs and is at the next ones")
        os.kill(farm.pids("tasks.worker localhost:0")[0], signal.SIGKILL)
        _, stderr = command.communicate(timeout=120)
    finally:
        command.kill()
        command.communicate()
    assert command.returncode == 0, stderr + farm.logs()
    settings = Settings(home=farm.home)
    database = open_database(settings)
    (kept,) = (farm.home / "data" / "logits").iterdir()
    yield Done(farm, settings, database, data, kept)
    database.close()


def _works(farm: Farm) -> bool:
    with suppress(sqlite3.Error):  # no table yet
        found = farm.sql("SELECT DISTINCT state FROM attempt WHERE device = 'localhost:0'")
        return {("won",), ("running",)} <= set(found)
    return False


def test_a_published_script_finds_the_accuracy_that_the_farm_reports(finished: Done, tmp_path: Path) -> None:
    labels = {sample.name: sample.label for sample in finished.data.samples}
    # The simulated device guesses: have it right now and then.
    labels |= dict(finished.farm.sql("SELECT name, class1 FROM result WHERE label % 3 = 0"))
    truth = tmp_path / "val_label.txt"
    truth.write_text("".join(f"{name}.JPEG {label}\n" for name, label in labels.items()))

    said = finished.farm.run("results", "1", "--outfmt", "TXT", "--output", str(tmp_path / "result"))

    right = _published_script(tmp_path / "result", truth)
    assert right / COUNT == pytest.approx(rescore(finished.database, 1, truth)["metrics"]["top1"] / 100)
    assert right > 10
    assert f"{COUNT} files" in said.stdout
    assert "simulated" in said.stderr
    assert finished.ingest(tmp_path / "result")["digest"] == finished.report["digest"]


def _published_script(results: Path, labels: Path) -> int:
    """How many are right: the n-th file by name has the n-th label by name; values end in a blank."""
    lines = sorted(labels.read_text().splitlines())
    right = 0
    for path, line in zip(sorted(results.iterdir()), lines, strict=True):
        first = path.read_text().split("\n")[0]
        values = np.array(first.split(" ")[:-1], dtype=float)
        assert values.shape == (1000,)
        right += int(np.argsort(-values)[0] == int(line.split(" ")[1]))
    return right


def test_raw_outputs_come_back_as_the_jobs_own_digest(finished: Done, tmp_path: Path) -> None:
    finished.results(tmp_path / "new" / "result")

    found = finished.ingest(tmp_path / "new" / "result")

    assert found["digest"] == finished.report["digest"] == simulated_digest(finished.data.samples)
    assert found["metrics"] == finished.report["metrics"]
    assert found["simulated"] is True


def test_files_and_the_summary_are_as_the_tool_leaves_them(finished: Done, tmp_path: Path) -> None:
    folder = tmp_path / "result"
    before = os.umask(0o077)
    try:
        finished.results(folder, "NPY")
    finally:
        os.umask(before)

    assert [path.name for path in sorted(folder.iterdir())] == [f"{name_of(i)}_0.npy" for i in range(1, COUNT + 1)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert np.load(folder / f"{name_of(1)}_0.npy").shape == (1, 1000)
    summary = json.loads((tmp_path / "result_summary.json").read_text())
    assert list(summary) == [
        "filesinfo", "args", "NPU_compute_time", "H2D_latency", "D2H_latency", "npu_compute_time_list", "throughput",
        "pid", "simulated",
    ]  # fmt: skip
    assert list(summary["H2D_latency"]) == ["min", "max", "mean", "median", "percentile(99%)", "count"]
    assert summary["throughput"] == pytest.approx(finished.report["fps"]["device"])
    assert summary["NPU_compute_time"]["count"] == sum(each["batches"] for each in finished.report["devices"])
    first = summary["filesinfo"]["0"]
    assert [Path(path).exists() for path in (*first["infiles"], *first["outfiles"])] == [True, True]
    assert len(summary["filesinfo"]) == COUNT
    with pytest.raises(UsageError, match=f"{folder} is not empty"):
        finished.results(folder)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match=r"_summary\.json is there already"):
        finished.results(folder)


def test_only_winners_files_are_left(finished: Done, tmp_path: Path) -> None:
    lost = finished.farm.sql(
        "SELECT s.idx, a.id FROM attempt a JOIN shard s ON s.id = a.shard_id WHERE a.state = 'lost'"
    )
    assert lost, "the killed worker held something"
    for shard, attempt in lost:
        (finished.kept / f"{shard}.{attempt}.bin").write_bytes(b"half of")
        (finished.kept / f"{shard}.{attempt}.bin.abc.part").write_bytes(b"half of")

    finished.results(tmp_path / "result")

    winners = finished.farm.sql("SELECT idx, winner FROM shard")
    assert sorted(path.name for path in finished.kept.iterdir()) == sorted("{}.{}.bin".format(*x) for x in winners)


def test_what_is_not_written_is_named(finished: Done, tmp_path: Path) -> None:
    winners = finished.farm.sql(
        "SELECT s.idx, s.winner, a.device FROM shard s JOIN attempt a ON a.id = s.winner ORDER BY s.idx"
    )
    away = next(winner for winner in winners if winner[2] == "localhost:0")
    removed = next(winner for winner in winners if winner[2] == "localhost:1")
    altered, cut, failed = [winner for winner in winners if winner not in (away, removed)][:3]
    by_attempt = "SELECT name FROM result WHERE attempt_id = ? ORDER BY name LIMIT 1"
    ((first,), (name,)) = (finished.farm.sql(by_attempt, each[1])[0] for each in (altered, failed))
    with _spoiled(finished, away, removed, altered, cut, name):
        done = finished.farm.run("results", "1", "--output", str(tmp_path / "result"), "--json", code=3)
        shown = finished.farm.run("report", "1", "--format", "lvvit", code=3)

    said = json.loads(done.stdout)
    assert said["elsewhere"] == {"rack7": [away[0]]}
    assert said["removed"] == [removed[0]]
    assert said["altered"] == ["{}.{}.bin".format(*cut[:2]), first]
    assert [each["name"] for each in said["failed"]] == [name]
    assert said["files"] == len(list((tmp_path / "result").iterdir()))
    assert f"left out: shard {away[0]} (" in done.stderr
    assert "is on host rack7: run farm results there" in done.stderr
    assert f"left out: what was kept of {said['altered'][0]} was altered" in done.stderr
    assert f"left out: {name}, " in done.stderr
    assert f"not in it: {name}, which failed" in shown.stderr


@contextmanager
def _spoiled(finished: Done, away: Any, removed: Any, altered: Any, cut: Any, failed: str) -> Iterator[None]:
    """Shards: one ran on another host, one has no file, one was altered, one cut off, and one has a failed sample."""
    saved = finished.kept.with_name("saved")
    shutil.copytree(finished.kept, saved)

    def change(host: str, state: str) -> None:
        with finished.database.write() as conn:
            conn.execute(text("UPDATE device SET host = :host WHERE name = :name"), {"host": host, "name": away[2]})
            conn.execute(text("UPDATE result SET state = :state WHERE name = :n"), {"state": state, "n": failed})

    for shard, attempt, _ in (away, removed):
        (finished.kept / f"{shard}.{attempt}.bin").unlink()
    path = finished.kept / "{}.{}.bin".format(*altered)
    path.write_bytes(b"\1\1\1" + path.read_bytes()[3:])
    os.truncate(finished.kept / "{}.{}.bin".format(*cut), 100)
    change("rack7", "failed")
    try:
        yield
    finally:
        change("localhost", "scored")
        shutil.rmtree(finished.kept)
        saved.rename(finished.kept)


def test_formats_of_the_guides_are_printed_and_others_refused(finished: Done) -> None:
    top1 = finished.report["metrics"]["top1"]

    lvvit = finished.farm.run("report", "1", "--format", "lvvit")

    assert lvvit.stdout == f"accuracy: {top1 / 100}\n"
    assert "simulated" in lvvit.stderr
    focal = published.build(finished.database, 1, "focal")
    assert json.loads(focal.text)["summary"]["Acc@1"] == pytest.approx(top1)
    assert focal.said[0] == f"Acc@1: {top1}"
    assert published.build(finished.database, 1, "summary").text.startswith("[INFO] -----")
    with pytest.raises(UsageError, match="--format swin is not for lvvit"):
        published.build(finished.database, 1, "swin")
    with pytest.raises(UsageError, match="--format gif: expected focal, "):
        published.build(finished.database, 1, "gif")
    assert "neither --json nor" in finished.farm.run("report", "1", "--format", "lvvit", "--json", code=2).stderr


def test_a_folder_that_lacks_results_is_partial(finished: Done, tmp_path: Path) -> None:
    folder = tmp_path / "result"
    finished.results(folder)
    (folder / f"{name_of(7)}_0.bin").unlink()
    (folder / "unknown_0.bin").touch()

    done = finished.farm.run("ingest", str(folder), "--model", "lvvit", code=3)

    assert "BIN (simulated)" in done.stdout
    assert f"{COUNT - 1} scored of {COUNT}: PARTIAL" in done.stdout
    assert f"lacks results: {name_of(7)} has no results" in done.stderr
    assert "belongs to no sample: unknown_0.bin" in done.stderr


def test_a_job_that_kept_nothing_or_is_not_done_has_no_results(finished: Done, tmp_path: Path) -> None:
    for keep, sentence in ((False, "submit it again with --keep-logits"), (True, "is pending: .*farm wait")):
        request = Request(model="lvvit", bs=4, backend="simulated", keep_logits=keep)
        (job,) = submit(finished.database, [plan(finished.settings, finished.database, request)])
        with pytest.raises(UsageError, match=sentence):
            outputs.write(finished.database, finished.settings, job.id, "BIN", tmp_path / "result")
    with pytest.raises(UsageError, match="is pending"):
        published.build(finished.database, job.id, "lvvit")


def test_a_disk_that_refuses_costs_no_sample(farm: Farm, tmp_path: Path) -> None:
    write_bins(farm.home / "data", 8)
    (farm.home / "data" / "logits").touch()  # where the folder should be
    failed = farm.submit("--bs", "4", "--backend", "simulated", "--keep-logits", code=1)
    assert "cannot keep the raw outputs" in failed["error"]
    (farm.home / "data" / "logits").unlink()

    farm.run("resume", "1")

    assert "8 files" in farm.run("results", "1", "--output", str(tmp_path / "out")).stdout


def test_much_to_keep_is_not_kept_without_asking(tmp_path: Path) -> None:
    farm = Farm(tmp_path / "home")
    directory = manifest.bins_dir(farm.home / "data", "seg")
    directory.mkdir(parents=True)
    windows = Windows(original=Size(512, 512), resized=Size(512, 512), annotation="0" * 16, xxh3=("0" * 16,))
    samples = [Sample(f"ADE_val_{number:08d}", 0, str(windows)) for number in range(80)]
    header = Header(recipe="seg", recipe_digest=SEG.digest, dtype="float32", shape=SEG.shape, classes=150)
    manifest.write(directory, header, samples)
    keep = ("submit", "swin", "--backend", "simulated", "--head", "full", "--keep-logits")

    refused = subprocess.run(
        [*farm.command, *keep, "--no-wait"],
        env=farm.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert refused.returncode == 2
    assert "raw outputs take 12.58 GB" in refused.stderr
    assert "Nothing was submitted: say --yes" in refused.stderr
    assert "With --keep-logits, raw outputs take 12.58 GB" in farm.run(*keep, "--dry-run").stdout
    assert "submitted: job 1." in farm.run(*keep, "--no-wait", "--yes").stdout
