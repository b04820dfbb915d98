"""The file of an attempt's raw outputs: whole under its name, or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from farm import logits
from farm.data.manifest import Sample
from farm.errors import DataError, HostError
from farm.logits import Reader, Writer

SAMPLES = [Sample(f"s{number}", number, "0" * 16) for number in range(3)]
OUTPUTS = np.arange(12, dtype=np.float32).reshape(3, 4)


def written(path: Path) -> Path:
    writer = Writer(path)
    writer.append((sample, 0, output) for sample, output in zip(SAMPLES[:2], OUTPUTS[:2], strict=True))
    writer.append([(SAMPLES[2], 0, OUTPUTS[2])])
    writer.finish()
    return path


def contents(path: Path) -> dict[str, list[float] | None]:
    return {
        row.stem: None if output is None else output.tolist() for row, output in Reader(path, "float32", (4,)).outputs()
    }


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "job" / "0.1.bin")

    assert contents(path) == {"s0": [0, 1, 2, 3], "s1": [4, 5, 6, 7], "s2": [8, 9, 10, 11]}
    assert list(path.parent.iterdir()) == [path]


def test_a_shard_of_which_nothing_reached_the_device_has_a_file_too(tmp_path: Path) -> None:
    Writer(tmp_path / "0.1.bin").finish()

    assert contents(tmp_path / "0.1.bin") == {}


def test_before_the_end_there_is_no_file_of_the_name_and_nothing_once_discarded(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "0.1.bin")
    writer.append([(SAMPLES[0], 0, OUTPUTS[0])])
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]

    writer.discard()

    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HostError):
        writer.append([(SAMPLES[1], 0, OUTPUTS[1])])
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_was_altered_is_told_apart(tmp_path: Path) -> None:
    path = written(tmp_path / "0.1.bin")
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)

    assert contents(path) == {"s0": [0, 1, 2, 3], "s1": None, "s2": [8, 9, 10, 11]}


@pytest.mark.parametrize("kept", [0, 5, 30, 60, -1])
def test_a_file_that_was_cut_off_is_none(kept: int, tmp_path: Path) -> None:
    path = written(tmp_path / "0.1.bin")
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(DataError, match=r"0\.1\.bin"):
        Reader(path, "float32", (4,))


def test_outputs_of_another_shape_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 outputs of"):
        Reader(written(tmp_path / "0.1.bin"), "float32", (5,))


def test_files_of_useless_attempts_go_and_no_others(tmp_path: Path) -> None:
    names = ["0.1.bin", "0.2.bin.xyz.part", "3.4.bin", "notes.txt", "5.6.bin.abc.part"]
    for name in names:
        (tmp_path / name).touch()

    logits.tidy(tmp_path, lambda attempts: {2, 4, 9}.intersection(attempts))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.1.bin", "5.6.bin.abc.part", "notes.txt"]
    logits.tidy(tmp_path / "none", lambda attempts: attempts)


def test_no_room_is_said_before_the_work_begins(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    logits.check_room(tmp_path / "not" / "there" / "yet", 1)

    with pytest.raises(HostError, match=r"no room for the raw outputs.* GB are needed for a shard, .* are free"):
        logits.check_room(tmp_path, 2 * free + 10**9)


def test_a_disk_that_refuses_is_the_hosts_fault_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "logits").touch()

    with pytest.raises(HostError, match=r"cannot keep the raw outputs in .*Not a directory"):
        Writer(tmp_path / "logits" / "1" / "0.1.bin").append([(SAMPLES[0], 0, OUTPUTS[0])])
