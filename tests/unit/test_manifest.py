import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farm.data import manifest
from farm.data.manifest import UNPREPARED, Header, Manifest, Sample
from farm.errors import DataError, StorageError

HEADER = Header(recipe="lvvit", recipe_digest="d" * 64, dtype="float32", shape=(3, 224, 224), classes=1000)
A = Sample("a", 1, "0123456789abcdef")
B = Sample("b", 2, UNPREPARED, "is empty (0 bytes), expected an image")

words = st.text(st.characters(codec="utf-8", exclude_characters="/\x7f", min_codepoint=0x20), min_size=1, max_size=20)
hashes = st.text("0123456789abcdef", min_size=16, max_size=16)
samples = st.builds(Sample, words, st.integers(0, 999), hashes) | st.builds(
    Sample, words, st.integers(0, 999), st.just(UNPREPARED), words
)
many_samples = st.lists(samples, unique_by=lambda sample: sample.name, max_size=8)
in_one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def write_text(directory: Path, text: str | bytes) -> None:
    (directory / "manifest").write_bytes(text.encode() if isinstance(text, str) else text)


def header_with(**changes: object) -> str:
    return json.dumps(HEADER.model_dump(mode="json") | changes) + "\n"


@in_one_folder
@given(written=many_samples)
def test_what_is_written_is_read_back(written: list[Sample], tmp_path: Path) -> None:
    manifest.write(tmp_path, HEADER, written)

    assert set(manifest.read(tmp_path).samples) == set(written)


@in_one_folder
@given(written=many_samples)
def test_reading_gives_what_writing_returned(written: list[Sample], tmp_path: Path) -> None:
    assert manifest.write(tmp_path, HEADER, written) == manifest.read(tmp_path)


@in_one_folder
@given(written=many_samples)
def test_samples_stand_in_byte_order_of_their_names(written: list[Sample], tmp_path: Path) -> None:
    names = [sample.name.encode() for sample in manifest.write(tmp_path, HEADER, written).samples]

    assert names == sorted(names)


@in_one_folder
@given(text=st.binary(max_size=200))
def test_bytes_that_are_no_manifest_are_a_data_error(text: bytes, tmp_path: Path) -> None:
    write_text(tmp_path, text)

    with pytest.raises(DataError, match="manifest"):
        manifest.read(tmp_path)


@in_one_folder
@given(line=st.text(max_size=60).filter(lambda line: "\n" not in line))
def test_a_line_either_says_what_a_sample_says_or_is_a_data_error(line: str, tmp_path: Path) -> None:
    write_text(tmp_path, (header_with() + line + "\n").encode(errors="surrogatepass"))

    try:
        read = manifest.read(tmp_path).samples
    except DataError:
        return
    assert [sample.line() for sample in read] == [line + "\n"]


def test_the_file_is_a_header_and_a_line_a_sample(tmp_path: Path) -> None:
    manifest.write(tmp_path, HEADER, [B, A])

    header, *lines = (tmp_path / "manifest").read_text().splitlines()
    assert json.loads(header)["recipe"] == "lvvit"
    assert lines == ["a\t1\t0123456789abcdef", "b\t2\t!\tis empty (0 bytes), expected an image"]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "c",
        "c\t3",
        "c\t3\t",
        "c\tthree\t0123456789abcdef",
        "c\t-3\t0123456789abcdef",
        "c\t+3\t0123456789abcdef",
        "c\t03\t0123456789abcdef",
        "c\t 3\t0123456789abcdef",
        "c\t1_0\t0123456789abcdef",
        "c\t٣\t0123456789abcdef",
        "c\t3\t0123456789ABCDEF",
        "c\t3\t0123456789abcde",
        "c\t3\t0123456789abcdef0",
        "c\t3\t0123456789abcdef\tproblem",
        "c\t3\t!",
        "c\t3\t!\t",
        "c\t3\t!\ttoo\tmany",
        "\t3\t0123456789abcdef",
        "../c\t3\t0123456789abcdef",
        "c\x00\t3\t0123456789abcdef",
        "c\t3\t0123456789abcdef\r",
    ],
)
def test_a_malformed_line_is_named(line: str, tmp_path: Path) -> None:
    write_text(tmp_path, header_with() + A.line() + line + "\n")

    with pytest.raises(DataError, match=r"line 3 is .*, expected name, label and xxh3 parted by tabs"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("second", [A, Sample("Z", 0, "0" * 16)], ids=["twice", "out of order"])
def test_names_that_do_not_ascend_are_a_data_error(second: Sample, tmp_path: Path) -> None:
    write_text(tmp_path, header_with() + A.line() + second.line())

    with pytest.raises(DataError, match=f"line 3: sample {second.name} comes after a"):
        manifest.read(tmp_path)


def test_a_label_beyond_the_classes_is_a_data_error(tmp_path: Path) -> None:
    write_text(tmp_path, header_with(classes=2) + A.line() + B.line())

    with pytest.raises(DataError, match="line 3: sample b has label 2, expected 0 to 1"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("text", [header_with()[:-1], header_with() + A.line()[:-1], header_with() + "a\t1"])
def test_a_file_that_ends_within_a_line_is_a_data_error(text: str, tmp_path: Path) -> None:
    write_text(tmp_path, text)

    with pytest.raises(DataError, match="ends in the middle of a line"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("first", ["", "{", "[]", "null", "{}", "a\t1\t0123456789abcdef", "[" * 20_000])
def test_a_first_line_that_is_no_header_is_a_data_error(first: str, tmp_path: Path) -> None:
    write_text(tmp_path, first + "\n")

    with pytest.raises(DataError, match="line 1 is no manifest header"):
        manifest.read(tmp_path)


def test_a_newer_version_asks_for_an_upgrade_whatever_else_it_holds(tmp_path: Path) -> None:
    write_text(tmp_path, '{"version": 2, "recipes": ["lvvit"]}\n')

    with pytest.raises(DataError, match="has version 2, this farm knows up to 1: upgrade the farm"):
        manifest.read(tmp_path)


def test_a_field_the_farm_does_not_know_is_passed_over(tmp_path: Path) -> None:
    write_text(tmp_path, header_with(comment="hello"))

    assert manifest.read(tmp_path).header == HEADER


def test_no_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared data in .*: run farm prepare first"):
        manifest.read(tmp_path)


def test_text_that_is_not_utf8_is_a_data_error(tmp_path: Path) -> None:
    write_text(tmp_path, header_with().encode() + b"\xff\t1\t0123456789abcdef\n")

    with pytest.raises(DataError, match="cannot read"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    "sample",
    [
        Sample("", 0, "0" * 16),
        Sample("a/b", 0, "0" * 16),
        Sample("a\tb", 0, "0" * 16),
        Sample("a\nb", 0, "0" * 16),
        Sample("a\udcff", 0, "0" * 16),
        Sample("a", -1, "0" * 16),
        Sample("a", 1000, "0" * 16),
        Sample("a", 0, "0"),
        Sample("a", 0, UNPREPARED),
        Sample("a", 0, "0" * 16, "problem"),
        Sample("a", 0, UNPREPARED, "two\nlines"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(sample: Sample, tmp_path: Path) -> None:
    before = manifest.write(tmp_path, HEADER, [B])

    with pytest.raises(DataError):
        manifest.write(tmp_path, HEADER, [sample])

    assert manifest.read(tmp_path) == before


def test_two_samples_of_one_name_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sample a comes after a"):
        manifest.write(tmp_path, HEADER, [A, Sample("a", 2, "0" * 16)])


def test_a_disk_that_refuses_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/none/manifest: No such file"):
        manifest.write(tmp_path / "none", HEADER, [A])


def test_writing_leaves_the_manifest_and_nothing_else(tmp_path: Path) -> None:
    manifest.write(tmp_path, HEADER, [A])

    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


@pytest.mark.parametrize(
    "other",
    [
        Manifest(HEADER, [A]),
        Manifest(HEADER, [A, Sample("c", B.label, B.xxh3, B.problem)]),
        Manifest(HEADER, [A, Sample(B.name, 3, B.xxh3, B.problem)]),
        Manifest(HEADER, [A, Sample(B.name, B.label, "0" * 16)]),
        Manifest(HEADER.model_copy(update={"recipe_digest": "e" * 64}), [A, B]),
    ],
    ids=["samples", "name", "label", "bytes", "recipe"],
)
def test_other_inputs_or_labels_have_another_digest(other: Manifest) -> None:
    assert other.digest != Manifest(HEADER, [A, B]).digest


@pytest.mark.parametrize(
    "same",
    [
        Manifest(HEADER, [A, Sample(B.name, B.label, UNPREPARED, "worded in another way")]),
        Manifest(HEADER.model_copy(update={"source": "/elsewhere"}), [A, B]),
    ],
    ids=["problem", "source"],
)
def test_the_same_inputs_elsewhere_have_the_same_digest(same: Manifest) -> None:
    assert same.digest == Manifest(HEADER, [A, B]).digest
