from pathlib import Path

import pytest

from farm.data import imagenet
from farm.errors import DataError, UsageError


def write_labels(directory: Path, text: str | bytes) -> Path:
    path = directory / "val_label.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def write_images(directory: Path, *names: str) -> Path:
    folder = directory / "images"
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "a.JPEG 65\nb.JPEG 0\n",
        "a 65\nb 0\n",
        "a.JPEG\t65\nb.jpeg\t0",
        "a.JPEG   65  \n\n  b.JPEG 0\n\n",
        "a.JPEG 65\r\nb.JPEG 0\r\n",
        "\N{ZERO WIDTH NO-BREAK SPACE}a.JPEG 65\nb.JPEG 0\n",
        "a.JPEG 65\nb.JPEG 0\na 65\n",
        "n01440764/a.JPEG 65\nval/n01443537/b.JPEG 0\n",
        "./a 65\n/data/b.x.JPEG 0\n",
    ],
    ids=[
        "usual",
        "no extension",
        "tabs",
        "spaces and blank lines",
        "CRLF",
        "byte order mark",
        "said twice",
        "class folders",
        "paths",
    ],
)
def test_labels_are_read_as_users_have_them(text: str, tmp_path: Path) -> None:
    assert imagenet.read_labels(write_labels(tmp_path, text)) == {"a": 65, "b": 0}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a.JPEG", "a file name and a class"),
        ("a.JPEG 65 66", "a file name and a class"),
        (".JPEG 65", "a file name and a class"),
        ("n01440764/ 65", "a file name and a class"),
        ("a.JPEG x", "a class from 0 to 999"),
        ("a.JPEG -1", "a class from 0 to 999"),
        ("a.JPEG 6.5", "a class from 0 to 999"),
        ("a.JPEG 1000", "a class from 0 to 999; are these classes counted from 1?"),
        ("a.JPEG ²", "a class from 0 to 999"),
        ("a.JPEG " + "9" * 5000, "a class from 0 to 999"),
        ("65 a.JPEG", "a class from 0 to 999"),
        ("first.JPEG 2", "class 1, which an earlier line gives first"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_expected(line: str, expected: str, tmp_path: Path) -> None:
    path = write_labels(tmp_path, f"first.JPEG 1\n\n{line}\n")

    with pytest.raises(DataError) as caught:
        imagenet.read_labels(path)

    assert str(caught.value).startswith(f"{path}: line 3 is {line[:80]!r}, expected {expected}")


@pytest.mark.parametrize("text", ["", "\n\n", "\r\n"])
def test_a_file_without_labels_is_a_data_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no labels, expected a line an image"):
        imagenet.read_labels(write_labels(tmp_path, text))


def test_labels_in_utf16_are_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not UTF-8 text"):
        imagenet.read_labels(write_labels(tmp_path, "a.JPEG 65\n".encode("utf-16")))


def test_missing_labels_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the labels in .*No such file"):
        imagenet.read_labels(tmp_path / "none.txt")


def test_images_are_found_by_name_up_to_the_first_dot_in_byte_order(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "b.JPEG", "a.x.jpeg", "a-b.jpeg", "C.jpg", "é.PNG", "ab.Jpg")

    assert list(imagenet.find_images(folder).items()) == [
        ("C", folder / "C.jpg"),
        ("a", folder / "a.x.jpeg"),
        ("a-b", folder / "a-b.jpeg"),
        ("ab", folder / "ab.Jpg"),
        ("b", folder / "b.JPEG"),
        ("é", folder / "é.PNG"),
    ]


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "a.JPEG", "._a.JPEG", "val_label.txt", "README")
    (folder / "folder.JPEG").mkdir()

    assert list(imagenet.find_images(folder)) == ["a"]


def test_two_files_of_one_name_are_a_data_error_with_both(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "a.JPEG", "a.png")

    with pytest.raises(DataError) as caught:
        imagenet.find_images(folder)

    assert f"{folder / 'a.JPEG'} and {folder / 'a.png'} are both called a" in str(caught.value)


@pytest.mark.parametrize("name", ["a\tb.JPEG", "a\nb.JPEG", "a\udcff.JPEG"], ids=["tab", "newline", "not UTF-8"])
def test_a_file_name_that_fits_no_manifest_is_a_data_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="rename it"):
        imagenet.find_images(write_images(tmp_path, name))


def test_a_folder_of_class_folders_is_a_usage_error_that_names_some(tmp_path: Path) -> None:
    for name in ("n01440764", "n01443537"):
        (tmp_path / name).mkdir()

    with pytest.raises(UsageError, match=r"no images in .*it holds 2 folders \(n01440764, n01443537\), expected files"):
        imagenet.find_images(tmp_path)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the images in .*No such file"):
        imagenet.find_images(tmp_path / "none")


def test_every_image_gets_its_label(tmp_path: Path) -> None:
    pictures = imagenet.load(
        write_images(tmp_path, "b.jpeg", "a.jpeg"), write_labels(tmp_path, "a.JPEG 65\nb.JPEG 0\n")
    )

    assert [(picture.name, picture.label) for picture in pictures] == [("a", 65), ("b", 0)]


def test_images_without_labels_are_counted_and_named(tmp_path: Path) -> None:
    folder = write_images(tmp_path, *(f"{letter}.JPEG" for letter in "abcde"))

    with pytest.raises(DataError, match=r"4 of 5 images in .* have no label \(b, c, d, \.\.\.\)"):
        imagenet.load(folder, write_labels(tmp_path, "a.JPEG 1\n"), subset=True)


def test_labels_without_images_are_counted_and_named(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, "a.JPEG 1\nb.JPEG 2\nc.JPEG 3\n")

    with pytest.raises(DataError, match=r"2 of 3 labels have no image in .* \(b, c; --subset allows this\)"):
        imagenet.load(write_images(tmp_path, "a.JPEG"), labels)


def test_a_subset_takes_the_labels_of_its_images(tmp_path: Path) -> None:
    labels = write_labels(tmp_path, "a.JPEG 1\nb.JPEG 2\nc.JPEG 3\n")

    pictures = imagenet.load(write_images(tmp_path, "b.JPEG"), labels, subset=True)

    assert [(picture.name, picture.label) for picture in pictures] == [("b", 2)]


# Class folders


def write_class_folders(directory: Path, count: int = 1000) -> Path:
    """As many folders; the images `in_K` stand in the K-th of them by name."""
    folder = directory / "val"
    for number in range(count):
        (folder / f"n{number:08}").mkdir(parents=True)
    for number in (0, 7, count - 1):
        (folder / f"n{number:08}" / f"in_{number}.JPEG").touch()
    return folder


def test_the_rank_of_an_images_folder_is_its_label(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path)

    assert [(p.name, p.label, p.path) for p in imagenet.load(folder, None)] == [
        ("in_0", 0, folder / "n00000000" / "in_0.JPEG"),
        ("in_7", 7, folder / "n00000007" / "in_7.JPEG"),
        ("in_999", 999, folder / "n00000999" / "in_999.JPEG"),
    ]


@pytest.mark.parametrize("count", [20, 999, 1001])
def test_another_number_of_folders_is_refused_for_their_ranks_are_not_the_classes(count: int, tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, count)

    with pytest.raises(DataError) as caught:
        imagenet.load(folder, None, subset=True)

    assert str(caught.value) == (
        f"{folder} holds {count} folders (n00000000, n00000001, n00000002, ...), expected one for each of 1000 "
        "classes: with others a folder's rank is not its class. Give the labels with --labels val_label.txt"
    )


def test_what_is_no_class_folder_has_no_rank(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path)
    (folder / ".cache").mkdir()
    (folder / "a_readme.txt").touch()

    assert [picture.label for picture in imagenet.load(folder, None)] == [0, 7, 999]


def test_images_in_folders_are_labelled_by_name_where_there_are_labels(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path, 20)
    labels = write_labels(tmp_path, "in_0.JPEG 5\nn00000007/in_7.JPEG 6\nin_19 7\n")

    assert [(p.name, p.label) for p in imagenet.load(folder, labels)] == [("in_0", 5), ("in_19", 7), ("in_7", 6)]


def test_images_of_one_name_in_two_folders_are_a_data_error_with_both(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path)
    (folder / "n00000001" / "in_7.png").touch()

    with pytest.raises(DataError, match=r"n00000001/in_7.png and .*n00000007/in_7.JPEG are both called in_7"):
        imagenet.load(folder, None)


def test_images_that_lie_in_no_folders_need_labels(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lie in no class folders: give their labels with --labels val_label.txt"):
        imagenet.load(write_images(tmp_path, "a.JPEG"), None)


@pytest.mark.parametrize("count", [0, 2, 1000])
def test_folders_without_an_image_are_a_usage_error(count: int, tmp_path: Path) -> None:
    for number in range(count):
        (tmp_path / "val" / f"n{number:08}").mkdir(parents=True)
    (tmp_path / "val").mkdir(exist_ok=True)
    labels = write_labels(tmp_path, "a.JPEG 1\n")

    with pytest.raises(UsageError, match=r"no images in .*val"):
        imagenet.load(tmp_path / "val", labels)
