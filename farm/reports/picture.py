"""An image, what was predicted of it, its annotation and the difference, side by side, with a legend."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from farm.data import ade20k, imagenet, manifest
from farm.data.ade20k_classes import NAMES
from farm.data.manifest import Windows
from farm.errors import FarmError
from farm.metrics import miou

Labels = NDArray[np.uint8]
Pixels = NDArray[np.uint8]

GAP, LINE, CAPTION = 8, 18, 22
WHITE, BLACK, GRAY = (255, 255, 255), (0, 0, 0), (96, 96, 96)
RIGHT, WRONG = (40, 110, 60), (220, 50, 40)
#: Classes listed by name; the others are too small to see.
MOST_NAMED = 24


def palette() -> Pixels:
    """A colour a class, [150, 3]: neighbours in number are far apart in hue."""
    golden = 0.618033988749895
    colours = [colorsys.hsv_to_rgb(i * golden % 1, 0.55 + 0.4 * (i % 2), 0.95 - 0.3 * (i % 3) / 2) for i in range(150)]
    return np.array([[round(255 * part) for part in colour] for colour in colours], np.uint8)


def mask(label_map: Labels) -> Image.Image:
    """As the dataset has its annotations: 8-bit gray, class c as c + 1."""
    return Image.fromarray(label_map + np.uint8(1))


def side_by_side(image: Image.Image, predicted: Labels, annotation: Labels, title: str) -> Image.Image:
    """All four [H, W] beside each other; annotation values as stored."""
    colours = palette()
    truth = annotation.astype(np.int16) - 1
    known = (annotation > 0) & (annotation != ade20k.IGNORED)
    annotated = np.where(known[..., None], colours[np.clip(truth, 0, 149)], np.uint8(0)).astype(np.uint8)
    difference = np.where((predicted == truth)[..., None], RIGHT, WRONG)
    difference = np.where(known[..., None], difference, GRAY).astype(np.uint8)
    panels = {
        "image": image.convert("RGB").resize(predicted.shape[::-1]),
        "prediction": Image.fromarray(colours[predicted]),
        "annotation (black: ignored)": Image.fromarray(annotated),
        "difference (green right, red wrong, gray ignored)": Image.fromarray(difference),
    }
    lines = _legend(miou.areas(predicted, annotation), predicted)
    height, width = predicted.shape
    columns = max(1, (4 * (width + GAP)) // 220)
    rows = -(-len(lines) // columns)
    canvas = Image.new("RGB", (4 * width + 5 * GAP, height + 2 * CAPTION + (rows + 1) * LINE + 2 * GAP), WHITE)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((GAP, 4), title, BLACK, font)
    for number, (name, panel) in enumerate(panels.items()):
        left = GAP + number * (width + GAP)
        draw.text((left, CAPTION), name, BLACK, font)
        canvas.paste(panel, (left, 2 * CAPTION))
    for number, (label, text) in enumerate(lines):
        left, top = GAP + number % columns * 220, height + 2 * CAPTION + GAP + number // columns * LINE
        draw.rectangle((left, top + 2, left + 12, top + 14), tuple(map(int, colours[label])))
        draw.text((left + 18, top), text, BLACK, font)
    return canvas


def _legend(areas: NDArray[np.int64], predicted: Labels) -> list[tuple[int, str]]:
    """Classes that are seen or meant, the largest first, each with its IoU in this image."""
    labelled = areas[2]
    sizes = np.maximum(np.bincount(predicted.ravel(), minlength=150), labelled)
    order = [int(label) for label in np.argsort(-sizes, kind="stable")[:MOST_NAMED] if sizes[label]]
    iou = miou.metrics(areas).iou
    lines = []
    for label in order:
        share = "" if np.isnan(iou[label]) else f" {iou[label]:.1f} %"
        lines.append((label, f"{NAMES[label][:22]}{share}"))
    return lines


def original(directory: Path, header: manifest.Header, name: str, windows: Windows) -> Image.Image:
    """The image as it was prepared from, or, where it is gone, put together from its windows' bins."""
    try:
        path = imagenet.find_images(Path(header.source))[name]
        with Image.open(path) as file:
            turned = ImageOps.exif_transpose(file)
            return turned.convert("RGB")
    except (FarmError, KeyError, OSError):
        return _from_bins(directory, header, name, windows)


def _from_bins(directory: Path, header: manifest.Header, name: str, windows: Windows) -> Image.Image:
    from farm.data import recipes, slide

    table = recipes.normalisation(recipes.RECIPES[header.recipe])
    pixels = np.zeros((*windows.resized, 3), np.uint8)
    for path, window in zip(
        manifest.window_paths(directory, name, windows), slide.windows(windows.resized), strict=True
    ):
        values = np.fromfile(path, header.dtype).reshape(header.shape)
        if header.dtype != "uint8":
            values = np.stack([np.searchsorted(table[c], values[c] - 1e-4).clip(0, 255) for c in range(3)])
        part = values[:, : window.y2 - window.y1, : window.x2 - window.x1]
        pixels[window.y1 : window.y2, window.x1 : window.x2] = part.transpose(1, 2, 0)
    return Image.fromarray(pixels).resize((windows.original.width, windows.original.height))
