import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from farm import zoo
from farm.data import recipes, seg
from farm.data.decoding import UnusableImage
from farm.data.recipes import (
    IN256,
    LVVIT,
    RECIPES,
    SEG,
    Classification,
    Recipe,
    Segmentation,
    crop_of_resized,
    exact_part,
    normalisation,
    prepare,
)
from farm.errors import DataError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "preprocess.json").read_text())
PICTURES = [name for name in EXPECTED if not name.startswith("_")]


def jpeg(name: str) -> bytes:
    with np.load(GOLDEN / "preprocess.npz") as arrays:
        data: bytes = arrays[f"{name}/jpeg"].tobytes()
    return data


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def png(width: int, height: int) -> bytes:
    """A file that says it is this big, and holds nothing of it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_the_golden_file_holds_eight_pictures() -> None:
    assert len(PICTURES) == 8


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("recipe", ["lvvit", "in256", "seg"])
def test_a_recipe_gives_the_reference_bytes(picture: str, recipe: str, tmp_path: Path) -> None:
    path = tmp_path / f"{picture}.JPEG"
    path.write_bytes(jpeg(picture))

    assert sha256(prepare(path, RECIPES[recipe])) == EXPECTED[picture][recipe]["f32_sha256"]


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("recipe", ["lvvit", "in256"])
def test_in_uint8_a_recipe_gives_the_reference_pixels(picture: str, recipe: str) -> None:
    array = prepare(io.BytesIO(jpeg(picture)), recipes.get(recipe, "uint8"))

    assert sha256(array) == EXPECTED[picture][recipe]["crop_u8_chw_sha256"]


@pytest.mark.parametrize("picture", PICTURES)
def test_in_uint8_segmentation_gives_the_reference_pixels(picture: str) -> None:
    array = prepare(io.BytesIO(jpeg(picture)), recipes.get("seg", "uint8"))

    assert sha256(array[::-1].transpose(1, 2, 0)) == EXPECTED[picture]["seg"]["resized_bgr_sha256"]


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_windows_are_the_parts_of_the_picture(picture: str, dtype: str) -> None:
    recipe = recipes.get("seg", dtype)
    assert isinstance(recipe, Segmentation)
    whole = prepare(io.BytesIO(jpeg(picture)), recipe)

    pixels = seg.resize(seg.decode(io.BytesIO(jpeg(picture))), Path("x"))
    for window, array in seg.cut(pixels, recipe):
        height, width = window.y2 - window.y1, window.x2 - window.x1
        assert (array.shape, array.dtype.name) == ((3, 512, 512), dtype)
        assert (array[:, :height, :width] == whole[:, window.y1 : window.y2, window.x1 : window.x2]).all()


@pytest.mark.parametrize(("dtype", "padding"), [("float32", [0, 0, 0]), ("uint8", [124, 116, 104])])
def test_below_a_panorama_windows_are_filled_up(dtype: str, padding: list[int]) -> None:
    recipe = recipes.get("seg", dtype)
    assert isinstance(recipe, Segmentation)

    pixels = seg.resize(seg.decode(io.BytesIO(jpeg("panorama"))), Path("x"))
    below = [array[:, 440:].copy() for _, array in seg.cut(pixels, recipe)]

    assert len(below) == 5
    assert [np.unique(part[channel]).tolist() for part in below for channel in range(3)] == [[p] for p in padding] * 5


def test_classification_does_without_opencv() -> None:
    code = "import sys, farm.data.prepare, farm.data.recipes; print('cv2' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_result_is_a_float32_array_in_c_order() -> None:
    array = prepare(io.BytesIO(jpeg("gray")), LVVIT)

    assert (array.dtype.name, array.shape, array.flags.c_contiguous) == ("float32", (3, 224, 224), True)


def test_a_bin_has_602112_bytes() -> None:
    assert LVVIT.nbytes == 602112


@settings(max_examples=150, deadline=None)
@given(width=st.integers(5, 1100), height=st.integers(5, 1100), seed=st.integers(0, 99))
@example(width=375, height=500, seed=0)
@example(width=500, height=333, seed=0)
@example(width=478, height=51, seed=0)  # a part of it that begins anywhere would be resized differently
def test_the_crop_alone_is_that_of_the_whole_resized_image(width: int, height: int, seed: int) -> None:
    assume(max(width, height) < 12 * min(width, height))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    for short_side in (248, 256):
        size = (short_side, int(short_side * height / width))
        if width > height:
            size = (int(short_side * width / height), short_side)
        rows_first = image.resize((size[0], height), Image.Resampling.BICUBIC)
        whole = rows_first.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - 224) / 2), round((size[1] - 224) / 2)

        cropped = crop_of_resized(image, size, 224)

        assert (np.asarray(cropped) == np.asarray(whole.crop((left, top, left + 224, top + 224)))).all()
        if height <= 2 * width:  # the higher ones Pillow 13 resizes columns first
            assert (np.asarray(whole) == np.asarray(image.resize(size, Image.Resampling.BICUBIC))).all()


@given(length=st.integers(1, 5000), resized=st.integers(224, 3000))
@example(length=375, resized=256)
@example(length=500, resized=330)
@example(length=478, resized=2324)
def test_a_part_is_resized_by_itself_only_where_pillow_computes_the_same_for_it(length: int, resized: int) -> None:
    start = round((resized - 224) / 2)

    part = exact_part(length, resized, start, start + 224)

    assert 0 <= part.start <= start
    assert start + 224 <= part.stop <= resized
    # Its box is in float32.
    assert [part.begin, part.end] == [float(np.float32(part.begin)), float(np.float32(part.end))]
    # One step, and the first position: rounded as in the whole, or not rounded at all.
    assert (part.end - part.begin) / (part.stop - part.start) == length / resized
    assert part.start == 0 or 1024 % Fraction(length, resized).denominator == 0


def test_the_shorter_side_of_in256_is_resized_for_the_crop_alone() -> None:
    assert exact_part(375, 256, 16, 240) == (16, 240, 375 / 16, 15 * 375 / 16)


def test_an_image_much_higher_than_wide_is_resized_rows_first_as_with_pillow_of_old() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 300, 3), np.uint8)

    cropped = crop_of_resized(Image.fromarray(noise), (256, 768), 224)

    # Made with Pillow 11.3: Image.resize((256, 768), BICUBIC), then the crop.
    assert sha256(np.asarray(cropped)) == "53a886543bf44f276f304775967f0ed284b6c8d73baee94d4efa19c533a0752b"


@pytest.mark.parametrize("channel", range(3))
def test_the_table_of_in256_holds_what_float32_arithmetic_gives(channel: int) -> None:
    mean, std = np.float32(IN256.mean[channel]), np.float32(IN256.std[channel])

    computed = [(np.float32(value) / np.float32(255) - mean) / std for value in range(256)]

    assert normalisation(IN256)[channel].tolist() == computed


@pytest.mark.parametrize("channel", range(3))
def test_the_table_holds_what_float64_arithmetic_gives(channel: int) -> None:
    mean, std = LVVIT.mean[channel], LVVIT.std[channel]

    computed = [np.float32((value - mean * 255) / (std * 255)) for value in range(256)]

    assert normalisation(LVVIT)[channel].tolist() == computed


def test_nobody_can_write_into_the_shared_table() -> None:
    with pytest.raises(ValueError, match="read-only"):
        normalisation(LVVIT)[0, 0] = 1


def test_the_digest_of_lvvit_is_the_one_users_have_bins_of() -> None:
    assert LVVIT.digest == "27ee27bb38a7429337fe9a90b874cae5cba9704d531346ecc70c58a3843253a6"


def test_in256_is_what_one_more_record_makes_of_lvvit() -> None:
    assert replace(LVVIT, name="in256", short_side=256, arithmetic="float32") == IN256


def test_every_recipe_has_a_digest_of_its_own_in_each_type() -> None:
    assert len({recipes.get(name, dtype).digest for name in RECIPES for dtype in ("float32", "uint8")}) == 6


@pytest.mark.parametrize(("name", "dtype"), [("resnet", "float32"), ("lvvit", "float16")])
def test_a_recipe_or_type_nobody_knows_is_a_usage_error(name: str, dtype: str) -> None:
    with pytest.raises(UsageError, match=r"lvvit, in256, seg|expected float32 or uint8"):
        recipes.get(name, dtype)


@pytest.mark.parametrize(
    "other",
    [
        replace(LVVIT, short_side=256),
        replace(LVVIT, crop=192),
        replace(LVVIT, mean=(0.5, 0.5, 0.5)),
        replace(LVVIT, std=(0.5, 0.5, 0.5)),
        replace(LVVIT, arithmetic="float32"),
        replace(LVVIT, dtype="uint8"),
    ],
    ids=["short_side", "crop", "mean", "std", "arithmetic", "dtype"],
)
def test_what_decides_the_bytes_changes_the_digest(other: Classification) -> None:
    assert other.digest != LVVIT.digest


def test_the_name_alone_does_not_change_the_digest() -> None:
    assert replace(LVVIT, name="other").digest == LVVIT.digest


def test_every_recipe_is_found_under_its_own_name() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}


@pytest.mark.parametrize("model", zoo.MODELS)
def test_a_models_recipe_gives_what_its_input_takes(model: str) -> None:
    spec = zoo.get(model)
    recipe = RECIPES[spec.recipe]

    assert (recipe.dtype, recipe.shape) == (spec.input.dtype, spec.input.shape)


@pytest.mark.parametrize("recipe", [LVVIT, SEG], ids=["classification", "segmentation"])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is empty (0 bytes), expected an image"),
        (b"<html>404</html>", "is not an image (16 bytes), expected JPEG, PNG, BMP, GIF or PPM"),
        (jpeg("tiny")[:1000], "does not decode: image file is truncated"),
        (jpeg("tiny")[:200], "does not decode"),
        (png(20_000, 20_000), "has too many pixels, expected at most 178956970"),
        (png(300, 300), "does not decode"),
    ],
    ids=["empty", "html", "truncated", "header only", "bomb", "no pixels"],
)
def test_what_does_not_decode_is_a_data_error_that_says_why(
    data: bytes, problem: str, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "x.JPEG"
    path.write_bytes(data)

    with pytest.raises(UnusableImage) as caught:
        prepare(path, recipe)

    assert caught.value.problem.startswith(problem)


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.JPEG"
    path.touch()

    with pytest.raises(DataError) as caught:
        prepare(path, LVVIT)

    assert str(caught.value) == f"{path}: is empty (0 bytes), expected an image"


def test_the_problem_does_not_depend_on_where_the_file_lies(tmp_path: Path) -> None:
    (tmp_path / "x.JPEG").write_bytes(b"noise")

    with pytest.raises(UnusableImage) as caught:
        prepare(tmp_path / "x.JPEG", LVVIT)

    assert str(tmp_path) not in caught.value.problem


def test_a_decoders_words_become_one_printable_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("chunk\t\x00\x1b[0m\nis \udcff wrong")

    monkeypatch.setattr(Image, "open", fail)

    with pytest.raises(UnusableImage) as caught:
        prepare(tmp_path / "x.JPEG", LVVIT)

    assert caught.value.problem == "does not decode: chunk [0m is wrong"


def test_a_file_without_permission_is_a_data_error(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # nobody may not walk through pytest's own folders
        path = Path("x.JPEG")
        path.write_bytes(jpeg("tiny"))
        path.chmod(0)
        with as_nobody(), pytest.raises(DataError, match="cannot be read: Permission denied"):
            prepare(path, LVVIT)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file or directory"):
        prepare(tmp_path / "x.JPEG", LVVIT)


def test_a_sliver_that_would_grow_beyond_memory_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "sliver.png"
    Image.new("RGB", (1, 65_000)).save(path)

    with pytest.raises(DataError, match="is 1 x 65000: with the shorter side resized to 248"):
        prepare(path, LVVIT)


def test_a_line_of_which_resizing_leaves_nothing_is_a_data_error(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (5000, 1)).save(path)

    with pytest.raises(DataError, match="is 5000 x 1: resized to 2048 x 0 nothing is left"):
        prepare(path, SEG)


def test_an_image_that_opencv_alone_cannot_read_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cv2.imdecode", lambda *_: None)

    with pytest.raises(DataError, match="OpenCV cannot read it, expected JPEG or PNG"):
        prepare(io.BytesIO(jpeg("tiny")), SEG)


def test_a_file_like_object_without_a_name_is_called_image() -> None:
    with pytest.raises(DataError, match=r"^image: is empty"):
        prepare(io.BytesIO(), LVVIT)
