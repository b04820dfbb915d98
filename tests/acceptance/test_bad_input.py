"""What people get wrong: one sentence that says what to do, the exit code of the contract, and nothing lost."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farm import artifacts
from farm.data import manifest
from tests.acceptance.conftest import Farm, assert_one_row_a_sample, wait_for
from tests.datasets import expected_digest, name_of, write_bins, write_tiny_onnx

COUNT = 24


@pytest.fixture
def data(farm: Farm) -> Path:
    data_dir = farm.home / "data"
    write_bins(data_dir, COUNT)
    write_tiny_onnx(data_dir, 4)
    return data_dir


def bin_of(data: Path, number: int) -> Path:
    return manifest.bin_path(manifest.bins_dir(data, "lvvit"), name_of(number))


def graph(data: Path) -> Path:
    return next(artifacts.directory(data, "lvvit").glob("*.onnx"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "resnet", "--bs", "4"], "unknown model 'resnet': the farm knows lvvit"),
        (["submit", "lvvit", "--bs", "8"], "no artifact of lvvit for bs 8"),
        (["submit", "lvvit", "--bs", "four"], "--bs four"),
        (["submit", "lvvit", "--bs", "0"], "--bs 0"),
        (["submit", "lvvit", "--bs", "4", "--devices", "localhost:7"], "unknown device localhost:7"),
        (["submit", "lvvit", "--bs", "4", "--backend", "gpu"], "--backend gpu"),
        (["submit", "lvvit", "--bs", "4", "--input", "float16"], "--input float16: expected float32 or uint8"),
        (["bench", "lvvit", "--input", "float16"], "--input float16: expected float32 or uint8"),
        (["suite", "--input", "float16"], "--input float16: expected float32 or uint8"),
        (["compile", "lvvit", "--input", "float16"], "--input float16: expected float32 or uint8"),
        (["submit", "lvvit", "--bs", "4", "--artifact", "abcdef"], "matches 'abcdef'"),
        (["submit", "lvvit", "--bs", "4", "--limit", "0"], "--limit"),
        (["report", "17"], "there is no job 17"),
        (["status", "17"], "there is no job 17"),
        (["cancel", "17"], "there is no job 17"),
        (["wait", "17"], "there is no job 17"),
        (["devour"], "No such command"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_exit_code_2(
    farm: Farm, data: Path, arguments: list[str], said: str
) -> None:
    assert said in farm.run(*arguments, code=2).stderr
    assert farm.processes() == []


def test_a_setting_that_does_not_fit_names_its_variable(farm: Farm) -> None:
    farm.env["FARM_LEASE_S"] = "soon"
    assert "FARM_LEASE_S" in farm.run("jobs", code=2).stderr


def test_without_prepared_data_submit_says_how_to_prepare(farm: Farm) -> None:
    write_tiny_onnx(farm.home / "data", 4)
    assert "farm prepare lvvit" in farm.run("submit", "lvvit", "--bs", "4", code=1).stderr


def test_several_fitting_artifacts_are_listed_and_one_can_be_chosen(farm: Farm, data: Path) -> None:
    other = write_tiny_onnx(data, 4, seed=1)
    said = farm.run("submit", "lvvit", "--bs", "4", code=2).stderr
    assert "--artifact SHA" in said
    assert other.sha256[:12] in said
    assert farm.submit("--bs", "4", "--artifact", other.sha256[:8])["artifact"] == other.sha256
    path = artifacts.directory(data, "lvvit") / other.file
    assert farm.submit("--bs", "4", "--artifact", str(path))["artifact"] == other.sha256


def test_a_file_that_is_no_artifact_of_the_store_is_not_mistaken_for_one_of_its_name(
    farm: Farm, data: Path, tmp_path: Path
) -> None:
    stranger = tmp_path / graph(data).name
    stranger.write_bytes(b"another graph")
    assert "no artifact" in farm.run("submit", "lvvit", "--bs", "4", "--artifact", str(stranger), code=2).stderr


def test_broken_bins_are_failed_samples_by_name_and_the_others_are_scored(farm: Farm, data: Path) -> None:
    bin_of(data, 2).write_bytes(bin_of(data, 2).read_bytes()[:-4])
    with bin_of(data, 3).open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0")
    bin_of(data, 5).unlink()
    bin_of(data, 24).write_bytes(b"")
    report = farm.submit("--bs", "4", code=3)
    assert report["state"] == "done_with_errors"
    assert report["samples"] == {"total": COUNT, "scored": COUNT - 4, "failed": 4}
    reasons = {failed["name"]: failed["reason"] for failed in report["failed"]}
    assert "602108 bytes, expected 602112" in reasons[name_of(2)]
    assert "altered after it was prepared" in reasons[name_of(3)]
    assert "No such file" in reasons[name_of(5)]
    assert "0 bytes" in reasons[name_of(24)]
    assert_one_row_a_sample(farm, report["job"], [name_of(i) for i in range(1, COUNT + 1)])


def test_a_batch_of_nothing_but_broken_bins_needs_no_device(farm: Farm, data: Path) -> None:
    for number in range(1, 5):
        bin_of(data, number).unlink()
    report = farm.submit("--bs", "4", "--limit", "4", code=3)
    assert report["samples"] == {"total": 4, "scored": 0, "failed": 4}
    assert report["metrics"] == {"top1": None, "top5": None}
    farm.run("report", "1", code=3)


def test_allowed_failures_exit_0_and_are_still_reported(farm: Farm, data: Path) -> None:
    bin_of(data, 2).unlink()
    report = farm.submit("--bs", "4", "--allow-failed", "1")
    assert report["state"] == "done_with_errors"
    assert report["samples"]["failed"] == 1


def test_a_graph_of_another_batch_size_fails_the_job_with_both_shapes(farm: Farm, data: Path) -> None:
    directory = artifacts.directory(data, "lvvit")
    eight = write_tiny_onnx(data, 8)
    artifacts.write_sidecar(
        directory,
        eight.model_copy(update={"bs": 16, "input": eight.input.model_copy(update={"shape": (16, 3, 224, 224)})}),
    )
    report = farm.submit("--bs", "16", code=1)
    assert report["state"] == "failed"
    assert "[8, 3, 224, 224]" in report["error"]
    assert "[16, 3, 224, 224]" in report["error"]


def test_an_altered_graph_fails_the_job(farm: Farm, data: Path) -> None:
    with graph(data).open("ab") as file:
        file.write(b"x")
    report = farm.submit("--bs", "4", code=1)
    assert "is not the artifact the job froze" in report["error"]


def test_a_lost_graph_fails_the_job(farm: Farm, data: Path) -> None:
    graph(data).unlink()
    assert "cannot read the artifact" in farm.submit("--bs", "4", code=1)["error"]


def test_data_prepared_anew_fails_the_job_that_froze_the_old(farm: Farm, data: Path) -> None:
    farm.run("submit", "lvvit", "--bs", "4", "--no-wait")
    write_bins(data, COUNT, seed=1)
    assert farm.run("wait", "1", code=1).returncode == 1
    assert "submit a new job" in farm.json("report", "1")["error"]


def test_a_database_of_a_newer_schema_is_refused_unchanged(farm: Farm, data: Path) -> None:
    farm.run("jobs")
    farm.sql("UPDATE alembic_version SET version_num = '9999'")
    said = farm.run("submit", "lvvit", "--bs", "4", code=1, timeout=60).stderr
    assert "newer than this farm's" in said
    assert farm.sql("SELECT version_num FROM alembic_version") == [("9999",)]


def test_a_database_that_is_none_is_refused(farm: Farm) -> None:
    farm.home.mkdir(parents=True)
    (farm.home / "farm.db").write_bytes(b"not a database, but long enough to have a header" * 50)
    assert "cannot use the database" in farm.run("jobs", code=1).stderr


def test_a_home_that_is_a_file_is_refused(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    farm.env["FARM_HOME"] = str(tmp_path / "file")
    assert "Set FARM_HOME" in farm.run("jobs", code=1).stderr


def test_a_taken_socket_path_is_explained(farm: Farm, data: Path) -> None:
    (farm.home / "run" / "broker.sock").mkdir(parents=True)
    said = farm.run("submit", "lvvit", "--bs", "4", code=1).stderr
    assert "broker.sock" in said
    (farm.home / "run" / "broker.sock").rmdir()


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_read_only_home_is_explained(farm: Farm) -> None:
    with small_disk(farm.home, "size=1m,ro"):
        said = farm.run("submit", "lvvit", "--bs", "4", code=1).stderr
    assert "Read-only file system" in said
    assert "FARM_HOME" in said


def test_a_full_disk_stops_a_job_that_goes_on_when_there_is_room(farm: Farm, tmp_path: Path) -> None:
    elsewhere = tmp_path / "data"
    write_bins(elsewhere, 160)
    write_tiny_onnx(elsewhere, 4, work=2000)
    farm.env.update(FARM_DATA=str(elsewhere), FARM_HEARTBEAT_S="0.5", FARM_LEASE_S="5")
    with small_disk(farm.home, "size=6m"):
        command = farm.start("submit", "lvvit", "--bs", "4", "--json")
        wait_for(lambda: (farm.home / "farm.db").exists() and _rows(farm) > 4, 60, "the job runs")
        filler = farm.home / "filler"
        fill(filler)
        before = _settled_rows(farm)
        assert command.poll() is None, "the job waits for room"
        filler.unlink()
        _, said = command.communicate(timeout=120)
        assert command.returncode == 0, said + farm.logs()
        assert before < 160
        assert farm.json("report", "1")["digest"] == expected_digest(elsewhere, 160)
        assert_one_row_a_sample(farm, 1, [name_of(i) for i in range(1, 161)])


def fill(path: Path) -> None:
    """Write until the disk refuses."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(b"\0" * 4096, 1 << 20))


def _rows(farm: Farm) -> int:
    try:
        return int(farm.sql("SELECT count(*) FROM result")[0][0])
    except Exception:  # no table yet
        return 0


def _settled_rows(farm: Farm) -> int:
    """How many rows there are once no more come."""
    rows = [-1]

    def unchanged() -> bool:
        rows.append(_rows(farm))
        return rows[-1] == rows[-2] and len(rows) > 60

    wait_for(unchanged, 60, "rows stop coming")
    return rows[-1]
