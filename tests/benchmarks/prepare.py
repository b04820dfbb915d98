"""
`prepare_dataset` against the published scripts' way over the same JPEGs, in one run.

    python -m tests.benchmarks.prepare [--images 2000] [--rounds 3] [--short]

The peer is one process of Pillow and numpy, as a script is: decode, resize, crop, normalise the whole array, `tofile`.
Its clock begins when it has imported both; the farm's when its processes are up, with the first `WARM` images: of the
50,000 that there are, the start is one in a thousand. It is reported apart (`start_s`), and counts in the CPU time an
image. Rounds alternate between peer and farm, because machines drift; ratios are medians over rounds. All bins must be
the peer's, bit for bit. Segmentation is measured beside, against nothing. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import random
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from farm.data import synthetic
from farm.data.manifest import bin_path
from farm.data.prepare import Prepared, prepare_dataset, prepare_segmentation
from farm.data.recipes import IN256, LVVIT, SEG, Classification

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: Different pictures among the images, of ILSVRC2012's usual size.
PICTURES = 96
#: Images for segmentation.
FEW = 200
#: Images after which the farm's processes have all begun.
WARM = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="60 images, one round: shows that it runs")
    arguments = parser.parse_args()
    images, rounds = (60, 1) if arguments.short else (arguments.images, arguments.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _write_images(root, images)
        measured = {recipe.name: [_round(root, recipe, images) for _ in range(rounds)] for recipe in (IN256, LVVIT)}
        seg = _segmentation(root, min(images, FEW))
    print(json.dumps(_summary(images, rounds, measured, seg)))


def _write_images(root: Path, count: int) -> None:
    """Photographs of about 500 x 375, two of five upright, and their labels and annotations."""
    photographs = synthetic.photographs()
    (root / "images").mkdir()
    (root / "few").mkdir()
    (root / "annotations").mkdir()
    for index in range(count):
        path = root / "images" / f"ILSVRC2012_val_{index + 1:08}.JPEG"
        if index < PICTURES:
            rng = random.Random(index)
            short = rng.choice((333, 375, 375, 400))
            size = (500, short) if rng.random() < 0.6 else (short, 500)
            image = synthetic.recolour(synthetic.piece(photographs[index % len(photographs)], *size, rng), rng)
            image.save(path, quality=95)
        else:
            shutil.copyfile(root / "images" / f"ILSVRC2012_val_{index % PICTURES + 1:08}.JPEG", path)
        if index < FEW:
            shutil.copyfile(path, root / "few" / path.name)
            with Image.open(path) as image:
                Image.new("L", image.size, 1).save(root / "annotations" / f"{path.stem}.png")
    names = sorted(path.name for path in (root / "images").iterdir())
    (root / "val_label.txt").write_text("".join(f"{name} 0\n" for name in names))


def _round(root: Path, recipe: Classification, count: int) -> dict[str, float]:
    """Images a second, each way."""
    images = sorted((root / "images").iterdir())
    (root / "plain").mkdir()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as peer:
        seconds, cpu_s = peer.submit(_plain, recipe.name, images, root / "plain").result()
    found = {"plain": count / seconds, "plain_cpu_ms": 1000 * cpu_s / count}
    prepare = partial(prepare_dataset, root / "images", root / "val_label.txt", recipe, root / "farm")
    for processes in (1, 2):
        cpu_began = _cpu_s()
        found[f"farm_{processes}"], found["start_s"] = _paced(partial(prepare, processes=processes), count)
        found[f"farm_{processes}_cpu_ms"] = 1000 * (_cpu_s() - cpu_began) / count
        _expect_same(root / "plain", root / "farm" / "bins" / f"{recipe.name}-float32", images)
        shutil.rmtree(root / "farm")
    shutil.rmtree(root / "plain")
    print(recipe.name, {key: round(value, 2) for key, value in found.items()}, file=sys.stderr)
    return found


def _segmentation(root: Path, count: int) -> dict[str, float]:
    """Images a second with windows and annotations."""
    found = {}
    prepare = partial(prepare_segmentation, root / "few", root / "annotations", SEG, root / "farm")
    for processes in (1, 2):
        found[f"farm_{processes}"], _ = _paced(partial(prepare, processes=processes), count)
        shutil.rmtree(root / "farm")
    return found


def _paced(prepare: Callable[..., Prepared], count: int) -> tuple[float, float]:
    """Images a second once the processes are up, and how long that took."""
    settled: dict[int, float] = {}
    began = perf_counter()
    prepared = prepare(progress=lambda done, _: settled.setdefault(done, perf_counter()))
    assert (prepared.done, prepared.failed) == (count, 0), prepared
    return (count - WARM) / (perf_counter() - settled[WARM]), settled[WARM] - began


def _cpu_s() -> float:
    """Of this process and those that it started and that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _expect_same(plain: Path, farm: Path, images: Sequence[Path]) -> None:
    for image in images:
        assert filecmp.cmp(plain / f"{image.stem}.bin", bin_path(farm, image.stem), shallow=False), image


def _plain(recipe: str, images: Sequence[Path], out: Path) -> tuple[float, float]:
    """Seconds, and seconds of CPU."""
    began, cpu_began = perf_counter(), process_time()
    for image in images:
        PLAIN[recipe](image).tofile(out / f"{image.stem}.bin")
    return perf_counter() - began, process_time() - cpu_began


def _cropped(path: Path, short_side: int) -> NDArray[np.uint8]:
    image = Image.open(path).convert("RGB")
    width, height = image.size
    if width < height:
        image = image.resize((short_side, int(short_side * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(short_side * width / height), short_side), Image.Resampling.BICUBIC)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    return np.asarray(image.crop((left, top, left + 224, top + 224)))


def _plain_in256(path: Path) -> NDArray[np.float32]:
    array = _cropped(path, 256).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    mean, std = (np.array(numbers, np.float32).reshape(3, 1, 1) for numbers in (MEAN, STD))
    return np.asarray((array - mean) / std, np.float32)


def _plain_lvvit(path: Path) -> NDArray[np.float32]:
    mean, std = (np.array(numbers) * 255 for numbers in (MEAN, STD))
    array = (_cropped(path, 248).astype(np.float64) - mean) / std
    return np.ascontiguousarray(array.transpose(2, 0, 1), np.float32)


PLAIN = {"in256": _plain_in256, "lvvit": _plain_lvvit}


def _summary(
    images: int, rounds: int, measured: dict[str, list[dict[str, float]]], seg: dict[str, float]
) -> dict[str, Any]:
    def figures(each: list[dict[str, float]]) -> dict[str, float]:
        return {key: round(statistics.median(found[key] for found in each), 2) for key in each[0]}

    def ratio(each: list[dict[str, float]], key: str) -> float:
        return statistics.median(found[key] / found["plain"] for found in each)

    def target(key: str, wanted: float) -> dict[str, Any]:
        # The worse of the recipes counts.
        value = min(ratio(each, key) for each in measured.values())
        return {"value": round(value, 3), "target": wanted, "met": value >= wanted}

    return {
        "benchmark": "prepare",
        "images": images,
        "rounds": rounds,
        "images_per_s": {name: figures(each) for name, each in measured.items()},
        "ratios": {
            name: {key: round(ratio(each, key), 3) for key in ("farm_1", "farm_2")} for name, each in measured.items()
        },
        "seg_images_per_s": {key: round(value, 1) for key, value in seg.items()},
        "targets": {"per_core": target("farm_1", 1.3), "two_cores": target("farm_2", 2.4)},
    }


if __name__ == "__main__":
    main()
