import hashlib
import io
import json
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm import zoo
from farm.data.recipes import RECIPES, Recipe, UnusableImage, normalisation, prepare
from farm.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "preprocess.json").read_text())
PICTURES = [name for name in EXPECTED if not name.startswith("_")]
LVVIT = RECIPES["lvvit"]


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
def test_lvvit_gives_the_reference_bytes(picture: str, tmp_path: Path) -> None:
    path = tmp_path / f"{picture}.JPEG"
    path.write_bytes(jpeg(picture))

    assert sha256(prepare(path, LVVIT)) == EXPECTED[picture]["lvvit"]["f32_sha256"]


@pytest.mark.parametrize("picture", PICTURES)
def test_a_recipe_in_float32_is_one_more_record(picture: str) -> None:
    recipe = replace(LVVIT, name="in256", short_side=256, arithmetic="float32")

    assert sha256(prepare(io.BytesIO(jpeg(picture)), recipe)) == EXPECTED[picture]["in256"]["f32_sha256"]


def test_the_result_is_a_float32_array_in_c_order() -> None:
    array = prepare(io.BytesIO(jpeg("gray")), LVVIT)

    assert (array.dtype.name, array.shape, array.flags.c_contiguous) == ("float32", (3, 224, 224), True)


def test_a_bin_has_602112_bytes() -> None:
    assert LVVIT.nbytes == 602112


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


@pytest.mark.parametrize(
    "other",
    [
        replace(LVVIT, short_side=256),
        replace(LVVIT, crop=192),
        replace(LVVIT, mean=(0.5, 0.5, 0.5)),
        replace(LVVIT, std=(0.5, 0.5, 0.5)),
        replace(LVVIT, arithmetic="float32"),
    ],
    ids=["short_side", "crop", "mean", "std", "arithmetic"],
)
def test_what_decides_the_bytes_changes_the_digest(other: Recipe) -> None:
    assert other.digest != LVVIT.digest


def test_the_name_alone_does_not_change_the_digest() -> None:
    assert replace(LVVIT, name="other").digest == LVVIT.digest


def test_every_recipe_is_found_under_its_own_name() -> None:
    assert {name: recipe.name for name, recipe in RECIPES.items()} == {name: name for name in RECIPES}


@pytest.mark.parametrize("model", [name for name in zoo.MODELS if zoo.get(name).dataset == "imagenet"])
def test_a_models_recipe_gives_what_its_input_takes(model: str) -> None:
    spec = zoo.get(model)
    recipe = RECIPES[spec.recipe]

    assert (recipe.dtype, recipe.shape) == (spec.input.dtype, spec.input.shape)


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
def test_what_does_not_decode_is_a_data_error_that_says_why(data: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "x.JPEG"
    path.write_bytes(data)

    with pytest.raises(UnusableImage) as caught:
        prepare(path, LVVIT)

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


def test_a_file_like_object_without_a_name_is_called_image() -> None:
    with pytest.raises(DataError, match=r"^image: is empty"):
        prepare(io.BytesIO(), LVVIT)
