import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from farm.data import ade20k
from farm.data.slide import Size
from farm.errors import DataError, UsageError

SIZE = Size(20, 30)


def png(values: np.ndarray, mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, "PNG")
    return file.getvalue()


def filled(value: int, *, dtype: str = "uint8") -> np.ndarray:
    values = np.zeros(SIZE, dtype)
    values[3, 4] = value
    return values


def write(directory: Path, *names: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name in names:
        (directory / name).touch()
    return directory


# Pairs


def test_images_and_annotations_are_paired_by_name(tmp_path: Path) -> None:
    images = write(tmp_path / "images", "ADE_val_2.jpg", "ADE_val_1.jpg", "a-b.PNG")
    annotations = write(tmp_path / "annotations", "ADE_val_1.png", "ADE_val_2.png", "a-b.png", "README", "._a-b.png")

    assert [(p.name, p.path.name, p.annotation and p.annotation.name) for p in ade20k.load(images, annotations)] == [
        ("ADE_val_1", "ADE_val_1.jpg", "ADE_val_1.png"),
        ("ADE_val_2", "ADE_val_2.jpg", "ADE_val_2.png"),
        ("a-b", "a-b.PNG", "a-b.png"),
    ]


def test_an_image_without_an_annotation_is_kept_to_be_counted(tmp_path: Path) -> None:
    images, annotations = write(tmp_path / "images", "a.jpg", "b.jpg"), write(tmp_path / "annotations", "b.png")

    assert [(p.name, p.annotation) for p in ade20k.load(images, annotations)] == [
        ("a", None),
        ("b", annotations / "b.png"),
    ]


def test_annotations_without_an_image_are_counted_and_named(tmp_path: Path) -> None:
    images = write(tmp_path / "images", "a.jpg")
    annotations = write(tmp_path / "annotations", "a.png", "b.png", "c.png")

    with pytest.raises(DataError, match=r"2 of 3 annotations have no image in .* \(b, c; --subset allows this\)"):
        ade20k.load(images, annotations)

    assert [picture.name for picture in ade20k.load(images, annotations, subset=True)] == ["a"]


def test_folders_that_have_no_name_in_common_are_a_data_error(tmp_path: Path) -> None:
    images, annotations = write(tmp_path / "images", "a.jpg"), write(tmp_path / "annotations", "b.png")

    with pytest.raises(
        DataError, match=r"no image in .* has an annotation of its name in .* \(images: a; annotations: b"
    ):
        ade20k.load(images, annotations, subset=True)


def test_a_folder_without_annotations_is_a_usage_error(tmp_path: Path) -> None:
    images, annotations = write(tmp_path / "images", "a.jpg"), write(tmp_path / "annotations", "a.jpg")

    with pytest.raises(UsageError, match=r"no annotations in .*, expected files \*.png"):
        ade20k.load(images, annotations)


def test_a_missing_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the annotations in .*No such file"):
        ade20k.find_annotations(tmp_path / "none")


# Annotations


@pytest.mark.parametrize("value", [0, 1, 150, 255])
def test_an_annotation_holds_0_to_150_and_255(value: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(filled(value)))

    values = ade20k.read_annotation(tmp_path / "a.png")

    assert (values == filled(value)).all()
    assert values.dtype == np.uint8


def test_an_annotation_with_a_palette_holds_its_indices() -> None:
    image = Image.fromarray(filled(150))
    image.putpalette([7] * 768)
    file = io.BytesIO()
    image.save(file, "PNG")

    assert (ade20k.check_annotation(file.getvalue(), SIZE) == filled(150)).all()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "its annotation does not decode, expected a PNG of one 8-bit channel"),
        (b"noise", "its annotation does not decode"),
        (png(filled(9))[:-30], "its annotation does not decode"),
        (png(filled(9), "RGB"), "its annotation has 8 bits, mode RGB, expected a PNG of one 8-bit channel"),
        (png(filled(9), "LA"), "its annotation has 8 bits, mode LA"),
        (png(filled(9), "1"), "its annotation has 1 bits"),
        (png(filled(9, dtype="uint16"), "I;16"), "its annotation has 16 bits"),
        (png(filled(9).T), "its annotation is 20 x 30, expected 30 x 20 like the image"),
        (png(filled(151)), "its annotation has the value 151, expected 0 to 150 or 255"),
        (png(filled(254)), "its annotation has the value 254"),
    ],
    ids=["empty", "noise", "truncated", "RGB", "LA", "1 bit", "16 bits", "turned", "151", "254"],
)
def test_what_is_no_annotation_of_the_image_says_why(data: bytes, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        ade20k.check_annotation(data, SIZE)

    assert str(caught.value).startswith(problem)


def test_a_jpeg_is_no_annotation() -> None:
    file = io.BytesIO()
    Image.fromarray(filled(9)).save(file, "JPEG")

    with pytest.raises(DataError, match="does not decode"):
        ade20k.check_annotation(file.getvalue(), SIZE)


def test_an_annotation_that_cannot_be_read_is_a_data_error_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"annotation {tmp_path}/a.png cannot be read: No such file"):
        ade20k.read_annotation(tmp_path / "a.png")
