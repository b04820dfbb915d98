import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farm.data import manifest, slide
from farm.data.manifest import UNPREPARED, Header, Manifest, Sample, Windows
from farm.data.slide import Size
from farm.errors import DataError, StorageError

HEADER = Header(recipe="lvvit", recipe_digest="d" * 64, dtype="float32", shape=(3, 224, 224), classes=1000)
A = Sample("a", 1, "0123456789abcdef")
B = Sample("b", 2, UNPREPARED, "is empty (0 bytes), expected an image")

WINDOWS = Windows(original=Size(500, 375), resized=Size(683, 512), annotation="a" * 16, xxh3=("0" * 16, "1" * 16))
C = Sample("c", 0, str(WINDOWS))

words = st.text(st.characters(codec="utf-8", exclude_characters="/\x7f", min_codepoint=0x20), min_size=1, max_size=20)
hashes = st.text("0123456789abcdef", min_size=16, max_size=16)
sides = st.integers(1, 2048)


@st.composite
def windows(draw: st.DrawFn) -> Windows:
    resized = Size(draw(sides), draw(sides))
    count = len(slide.windows(resized))
    each = draw(st.lists(hashes, min_size=count, max_size=count))
    return Windows(original=Size(draw(sides), draw(sides)), resized=resized, annotation=draw(hashes), xxh3=tuple(each))


samples = (
    st.builds(Sample, words, st.integers(0, 999), hashes, st.just(""))
    | st.builds(Sample, words, st.integers(0, 999), st.just(UNPREPARED), words)
    | st.builds(Sample, words, st.just(0), windows().map(str), st.just(""))
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


# Segmentation


@given(written=windows())
def test_windows_are_what_their_line_says(written: Windows) -> None:
    assert Sample("a", 0, str(written)).windows == written


@pytest.mark.parametrize("sample", [A, B], ids=["a bin", "unprepared"])
def test_a_sample_of_classification_has_no_windows(sample: Sample) -> None:
    assert sample.windows is None


def test_an_image_cut_into_windows_is_one_line(tmp_path: Path) -> None:
    manifest.write(tmp_path, HEADER, [C])

    assert (tmp_path / "manifest").read_text().splitlines()[1] == (
        "c\t0\t500,375/683,512/aaaaaaaaaaaaaaaa/0000000000000000,1111111111111111"
    )


def test_its_files_are_the_windows_and_the_annotation(tmp_path: Path) -> None:
    assert [str(path) for path in manifest.paths(Path("bins"), "c", C.xxh3)] == [
        "bins/c-0,0,512,512-500,375,3-1,683,512.bin",
        "bins/c-0,171,512,683-500,375,3-1,683,512.bin",
        "bins/annotations/c.png",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "500,375/683,512/" + "a" * 16,
        "500,375/683,512/" + "a" * 16 + "/",
        "500,375/683,512/" + "a" * 16 + "/" + "0" * 15,
        "500,375/683,512/" + "0" * 16 + "," + "1" * 16,
        "0,375/683,512/" + "a" * 16 + "/" + "0" * 16,
        "500,375/683,99999/" + "a" * 16 + "/" + "0" * 16,
        "500/683,512/" + "a" * 16 + "/" + "0" * 16,
    ],
)
def test_windows_that_are_malformed_are_a_data_error(text: str, tmp_path: Path) -> None:
    write_text(tmp_path, header_with() + A.line() + f"c\t0\t{text}\n")

    with pytest.raises(DataError, match=r"line 3 is .*, expected name, label and xxh3 parted by tabs"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_windows_than_the_size_gives_is_a_data_error(count: int, tmp_path: Path) -> None:
    text = "500,375/683,512/" + "a" * 16 + "/" + ",".join(["0" * 16] * count)
    write_text(tmp_path, header_with() + A.line() + f"c\t0\t{text}\n")

    with pytest.raises(DataError, match=f"line 3: sample c has {count} windows, expected 2 of 683 x 512 pixels"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"annotation": "b" * 16}, {"xxh3": ("0" * 16, "2" * 16)}, {"original": Size(501, 375)}],
    ids=["annotation", "a window", "size"],
)
def test_other_windows_or_annotations_have_another_digest(changes: dict[str, object]) -> None:
    other = Sample("c", 0, str(replace(WINDOWS, **changes)))  # type: ignore[arg-type]

    assert Manifest(HEADER, [other]).digest != Manifest(HEADER, [C]).digest


def test_the_digest_of_classification_is_the_one_that_jobs_have_frozen() -> None:
    assert Manifest(HEADER, [A, B]).digest == "5f32c316a86dd3b8da0e4e64fdaa78062b5c988d7f6247a18c0e3c0e94e65b27"


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


@in_one_folder
@given(written=many_samples, data=st.data())
def test_what_has_a_digest_is_what_was_read_when_it_was_taken(
    tmp_path: Path, written: list[Sample], data: st.DataObject
) -> None:
    manifest.write(tmp_path, HEADER, written)
    found = manifest.read(tmp_path)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(found.samples))] * 2), label="start and stop"))

    frozen = manifest.frozen(tmp_path, found.digest)

    assert frozen is not None
    assert tuple(frozen.samples(start, stop)) == found.samples[start:stop]
    assert tuple(frozen.samples(0, len(found.samples))) == found.samples


@pytest.mark.parametrize("change", [("\t1\t", "\t2\t"), ("0123", "0124"), ("a\t", "aa\t"), ("d" * 64, "e" * 64)])
def test_what_was_changed_has_the_digest_no_more(tmp_path: Path, change: tuple[str, str]) -> None:
    digest = manifest.write(tmp_path, HEADER, [A, B, C]).digest
    path = tmp_path / "manifest"
    path.write_text(path.read_text().replace(*change))

    assert manifest.frozen(tmp_path, digest) is None


def test_why_a_sample_could_not_be_prepared_may_be_worded_otherwise(tmp_path: Path) -> None:
    digest = manifest.write(tmp_path, HEADER, [A, B]).digest
    path = tmp_path / "manifest"
    path.write_text(path.read_text().replace("is empty", "has nothing in it"))

    frozen = manifest.frozen(tmp_path, digest)

    assert frozen is not None
    assert frozen.samples(1, 2)[0].problem.startswith("has nothing in it")


def test_no_manifest_is_not_the_one_with_the_digest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data"):
        manifest.frozen(tmp_path, "0" * 64)
