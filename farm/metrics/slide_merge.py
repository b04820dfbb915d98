"""
From the logits of an image's windows to its label map: exact, without ever holding the image's logits.

The published arithmetic puts the windows' logits on a canvas of the resized picture, divides by how many windows a
pixel lies in, resizes to the original size, and takes the best class. All of it up to the last step is linear, with
weights that are not negative and sum to 1; so is the resize from a small head's 128 x 128 cells to a window's pixels.
A pixel's logits are therefore a convex combination of a few cells' logits, and the weights of an axis do not depend on
the other axis. Two things follow. A class that is lower in all cells of a neighbourhood than another class is in any
of them is the best of no pixel there: most classes, nearly everywhere, need no arithmetic. And the others are combined
along rows first, then along columns.

Ties: the lowest class. Knows neither files nor devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from farm.data.slide import CROP, Size, windows

cgutils: Any = _cgutils  # typed in part, and differently from release to release

Logits = NDArray[np.float32]
Labels = NDArray[np.uint8]

CLASSES = 150
LANES = 16  #: pixels that are computed at a time, side by side; the label map is made in tiles of LANES x LANES
STRIP = 16  #: tiles side by side that take turns class by class: long enough runs of cells, few enough pixels to keep
AHEAD = 3  #: sums before a sum's cells are needed, they are asked for
GROUP = 4  #: rows of cells that are combined at a time
GRID = 32  #: a window's cells are bounded in GRID x GRID blocks, fewer if it has fewer cells
PARTS = 8  #: pieces of work for several threads

#: How many windows can share a pixel: the last one may begin less than 128 after its predecessor.
SHARED = 3


def _jit(function: Callable[..., Any]) -> Any:
    """Compiled at the first call, then kept on disk: beside this file, in NUMBA_CACHE_DIR, or in the user's cache."""
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # nowhere to write: every process compiles
        return numba.njit(nogil=True, error_model="numpy")(function)


def _intrinsic(function: Callable[..., Any]) -> Any:
    """A function for compiled ones to call, which says the instructions itself."""
    return intrinsic(function)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """
    Pixels of an axis that need no window after the one it is for, in tiles of `LANES`.

    A tile's lines are the rows or columns of cells that it touches, window by window.
    """

    start: int  #: first pixel
    stop: int  #: one past the last
    first: int  #: first window that its pixels need
    oldest: int  #: first window that the axis' later pixels need
    tiles: NDArray[np.int64]  #: [tiles + 1]: where each tile's spans begin
    spans: NDArray[np.int64]  #: [n, 4]: window (counted from `first`), its first cell, how many, the first's line
    weights: NDArray[np.float32]  #: [lines, LANES] of each tile's pixels
    pixels: NDArray[np.int64]  #: [pixels + 1]: where each pixel's entries in the next two begin
    lines: NDArray[np.int64]  #: of the entries, counted in their tile
    shares: NDArray[np.float32]  #: weights of these lines


@lru_cache(maxsize=64)
def axis(original: int, intervals: tuple[tuple[int, int], ...], cells: int) -> tuple[Segment, ...]:
    """
    How an axis of the label map is made of the windows' cells, a segment for each window.

    The windows lie at these intervals of the resized picture, with `cells` cells for `CROP` pixels. Computed in
    float64. Half-pixel centres, edges repeated, as PyTorch's bilinear resize without align_corners.
    """
    starts, stops = np.array(intervals).T
    near, far, share = _neighbours(stops[-1], original)
    # One row for each place of the resized picture that a pixel lies beside, window that it may be in, and cell.
    pixel = np.arange(original)
    place = np.stack([near, far])[:, :, None]
    part = np.stack([1 - share, share])[:, :, None]
    inside = (starts <= place) & (place < stops)
    part = part * inside / inside.sum(axis=-1, keepdims=True)
    cell_near, cell_far, cell_share = _neighbours(cells, CROP)
    at = np.where(inside, place - starts, 0)
    weight = np.stack([part * (1 - cell_share[at]), part * cell_share[at]])
    key = np.stack([cell_near[at], cell_far[at]]) + np.arange(len(starts)) * cells
    pixel = np.broadcast_to(pixel[None, None, :, None], key.shape)
    counts = weight > 0
    found, which = np.unique(pixel[counts] * (len(starts) * cells) + key[counts], return_inverse=True)
    pixel, key = np.divmod(found, len(starts) * cells)
    weight = np.bincount(which, weight[counts])
    window, cell = np.divmod(key, cells)
    newest = np.zeros(original, np.int64)
    oldest = np.full(original, len(starts))
    np.maximum.at(newest, pixel, window)
    np.minimum.at(oldest, pixel, window)
    bounds = [0, *np.searchsorted(newest, np.arange(len(starts)), side="right").tolist()]
    segments = []
    for start, stop in pairwise(bounds):
        mine = (start <= pixel) & (pixel < stop)
        first = int(oldest[start:stop].min(initial=len(starts)))
        segments.append(
            _segment(
                (start, stop, first, int(oldest[stop:].min(initial=len(starts)))),
                pixel[mine] - start, window[mine] - first, cell[mine], weight[mine], cells,
            )
        )  # fmt: skip
    return tuple(segments)


def _segment(
    place: tuple[int, int, int, int],
    pixel: NDArray[np.int64],
    window: NDArray[np.int64],
    cell: NDArray[np.int64],
    weight: NDArray[np.float64],
    cells: int,
) -> Segment:
    """The segment at (start, stop, first, oldest), of entries sorted by pixel, counted from the start, window, cell."""
    start, stop, first, oldest = place
    count = -(-(stop - start) // LANES)
    wide = int(window.max(initial=0)) + 1
    assert wide <= SHARED, "more windows share a tile than the kernels know"
    span = pixel // LANES * wide + window
    low, high = np.full(count * wide, cells), np.full(count * wide, -1)
    np.minimum.at(low, span, cell)
    np.maximum.at(high, span, cell)
    used = high >= 0
    low = np.minimum(low, cells - GROUP)
    length = np.where(used, np.maximum(high + 1 - low, GROUP), 0)
    line = np.cumsum(length) - length
    weights = np.zeros((int(length.sum()), LANES), np.float32)
    weights[line[span] + cell - low[span], pixel % LANES] = weight
    windows_ = np.tile(np.arange(wide), count)
    return Segment(
        start=start,
        stop=stop,
        first=first,
        oldest=oldest,
        tiles=np.cumsum([0, *used.reshape(count, wide).sum(axis=1)], dtype=np.int64),
        spans=np.stack([windows_, low, length, line], axis=1)[used],
        weights=weights,
        pixels=np.searchsorted(pixel, np.arange(stop - start + 1)),
        lines=line[span] + cell - low[span] - line[pixel // LANES * wide],
        shares=weight.astype(np.float32),
    )


def _neighbours(given: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """For each of `wanted` pixels the two of `given` that it lies between, and the share of the second."""
    place = np.maximum((np.arange(wanted) + 0.5) * (given / wanted) - 0.5, 0)
    near = np.minimum(place.astype(np.int64), given - 1)
    far = np.minimum(near + 1, given - 1)
    return near, far, np.where(far > near, place - near, 0.0)


@dataclass(frozen=True, slots=True)
class _Held:
    logits: Logits
    low: NDArray[np.float32]  #: of each block of cells, [GRID, GRID, 150]
    high: NDArray[np.float32]


class ImageMerge:
    """
    One image's label map, made as its windows come. Used from a single thread at a time.

    Each window's work is shared out among the executor's threads, if there is one; results are the same.
    """

    def __init__(self, original: Size, resized: Size, cells: int, threads: Executor | None = None) -> None:
        places = windows(resized)
        down = tuple(dict.fromkeys((place.y1, place.y2) for place in places))
        across = tuple(dict.fromkeys((place.x1, place.x2) for place in places))
        if len(down) > 1 and len(across) > 1:
            raise ValueError(f"windows of {resized} make no row or column: the shorter side must be {CROP} at most")
        if cells < LANES or cells % LANES or CROP % cells:
            raise ValueError(
                f"a window has {cells} x {cells} cells, expected a multiple of {LANES} that divides {CROP}"
            )
        #: [H, W]. It means something when `is_complete`, unless some logit was not finite.
        self.label_map: Labels = np.zeros(original, np.uint8)
        self.is_finite = True  #: no logit so far was NaN or infinite
        self._shape = (CLASSES, cells, cells)
        self._windows = len(places)
        self._rows, self._columns = axis(original.height, down, cells), axis(original.width, across, cells)
        self._is_tall = len(down) > 1
        self._arrived = 0
        self._held: dict[int, _Held] = {}
        self._threads = threads

    @property
    def is_complete(self) -> bool:
        return self._arrived == self._windows

    @property
    def held(self) -> list[Logits]:
        """The windows that must stay as they are until more have come."""
        return [each.logits for each in self._held.values()]

    def add(self, logits: Logits) -> None:
        """
        Take the next window, float32 [150, cells, cells], in row-major order, and finish the pixels that wait for it.

        The array is read again while it is among `held`.
        """
        if logits.shape != self._shape or self.is_complete:
            raise ValueError(
                f"window {self._arrived + 1} of {self._windows} has the shape {logits.shape}, expected {self._shape}"
            )
        number = self._arrived
        new = self._held[number] = self._bounded(np.ascontiguousarray(logits, np.float32))
        self._arrived += 1
        segment = (self._rows if self._is_tall else self._columns)[number]
        if segment.stop > segment.start and self.is_finite:
            self._finish(segment, [self._held[key] for key in range(segment.first, number)] + [new])
        self._held = {key: window for key, window in self._held.items() if key >= segment.oldest}

    def _bounded(self, logits: Logits) -> _Held:
        cells = logits.shape[1]
        grid = min(GRID, cells)
        new = _Held(logits, np.empty((grid, grid, CLASSES), np.float32), np.empty((grid, grid, CLASSES), np.float32))
        address = logits.ctypes.data
        finite = self._in_parts(grid, lambda start, stop: _bound(address, cells, new.low, new.high, start, stop))
        self.is_finite &= all(finite)
        return new

    def _finish(self, segment: Segment, needed: list[_Held]) -> None:
        rows, columns = (segment, self._columns[0]) if self._is_tall else (self._rows[0], segment)
        some = needed + needed[-1:] * (SHARED - len(needed))
        addresses = np.array([each.logits.ctypes.data for each in some], np.int64)
        low, high = tuple(each.low for each in some), tuple(each.high for each in some)
        self._in_parts(
            len(rows.tiles) - 1,
            lambda start, stop: _merge(
                addresses, self._shape[1], low, high,
                rows.start, rows.tiles, rows.spans, rows.pixels, rows.lines, rows.shares,
                columns.start, columns.stop, columns.tiles, columns.spans, columns.weights,
                self.label_map, start, stop,
            ),
        )  # fmt: skip

    def _in_parts(self, count: int, work: Callable[[int, int], Any]) -> list[Any]:
        """What the work from one number below `count` to another returns, for all of them."""
        if self._threads is None:
            return [work(0, count)]
        ends = [count * part // PARTS for part in range(PARTS + 1)]
        return list(self._threads.map(work, ends[:-1], ends[1:]))


def merge(logits: Sequence[Logits], original: Size, resized: Size) -> Labels:
    """The label map, uint8 [H, W], of an image whose windows are all there, float32 [150, cells, cells] each."""
    image = ImageMerge(original, resized, logits[0].shape[-1])
    for each in logits:
        image.add(each)
    return image.label_map


@_jit
def _bound(address: int, cells: int, low: Any, high: Any, start: int, stop: int) -> Any:
    """
    Lowest and highest of each class in each block of cells, [grid, grid, 150], and whether all are finite.

    The logits, [150, cells, cells], are at `address`; `start` and `stop` are rows of blocks.
    """
    grid = low.shape[0]
    side = cells // grid
    lows, highs, traces = np.empty(cells, np.float32), np.empty(cells, np.float32), np.zeros(LANES, np.float32)
    for row in range(start, stop):
        for label in range(CLASSES):
            _bound_columns(
                address + 4 * (label * cells + row * side) * cells, side, cells, 4 * cells * cells,
                lows.ctypes.data, highs.ctypes.data, traces.ctypes.data,
            )  # fmt: skip
            length = cells
            while length > grid:
                length //= 2
                _halve(lows.ctypes.data, highs.ctypes.data, length)
            for column in range(grid):
                low[row, column, label] = lows[column]
                high[row, column, label] = highs[column]
    finite = True
    for i in range(LANES):
        finite &= traces[i] == 0
    return finite


@_jit
def _merge(
    addresses: Any, cells: int, low: Any, high: Any,
    y_start: int, y_tiles: Any, y_spans: Any, y_pixels: Any, y_lines: Any, y_shares: Any,
    x_start: int, x_stop: int, x_tiles: Any, x_spans: Any, x_weights: Any,
    out: Any, start: int, stop: int,
) -> None:  # fmt: skip
    """Fill a segment of the label map, of its rows of tiles those from `start` to `stop`, from up to three windows."""
    side = cells // low[0].shape[0]
    most = 0
    for y in range(start, stop):
        last = y_tiles[y + 1] - 1
        most = max(most, y_spans[last, 3] + y_spans[last, 2] - y_spans[y_tiles[y], 3])
    lines = np.empty((most, LANES), np.float32)
    best, number = np.empty((STRIP, LANES, LANES), np.float32), np.empty((STRIP, LANES, LANES), np.int32)
    jobs = np.empty((CLASSES * STRIP, 2), np.int64)  # class and tile
    possible = np.empty((STRIP, CLASSES), np.bool_)
    # Addresses are taken where they are used, as an array goes with the last mention of its name.
    for y in range(start, stop):
        top, height = y * LANES, min(LANES, len(y_pixels) - 1 - y * LANES)
        down, down_end = y_tiles[y], y_tiles[y + 1]
        for x in range(0, len(x_tiles) - 1, STRIP):
            count = min(STRIP, len(x_tiles) - 1 - x)
            best[:] = -np.inf
            for tile in range(count):
                only = _possible(
                    low, high, side, y_spans[down:down_end], x_spans[x_tiles[x + tile] : x_tiles[x + tile + 1]],
                    possible[tile],
                )  # fmt: skip
                number[tile] = max(only, 0)
            found = 0
            for label in range(CLASSES):
                for tile in range(count):
                    if possible[tile, label]:
                        jobs[found, 0], jobs[found, 1] = label, tile
                        found += 1
            for job in range(-AHEAD, found):
                if job + AHEAD < found:
                    label, tile = jobs[job + AHEAD]
                    for i in range(down, down_end):
                        for j in range(x_tiles[x + tile], x_tiles[x + tile + 1]):
                            place = (label * cells + y_spans[i, 1]) * cells + x_spans[j, 1]
                            _prefetch(
                                addresses[y_spans[i, 0] + x_spans[j, 0]] + 4 * place, 4 * cells,
                                y_spans[i, 2], 4 * x_spans[j, 2] - 1,
                            )  # fmt: skip
                if job < 0:
                    continue
                label, tile = jobs[job]
                for i in range(down, down_end):
                    for begin in range(0, y_spans[i, 2], GROUP):
                        line = min(begin, y_spans[i, 2] - GROUP)
                        for j in range(x_tiles[x + tile], x_tiles[x + tile + 1]):
                            place = (label * cells + y_spans[i, 1] + line) * cells + x_spans[j, 1]
                            _combine(
                                addresses[y_spans[i, 0] + x_spans[j, 0]] + 4 * place, 4 * cells,
                                x_weights.ctypes.data + 4 * LANES * x_spans[j, 3], x_spans[j, 2],
                                lines.ctypes.data + 4 * LANES * (y_spans[i, 3] - y_spans[down, 3] + line),
                                j == x_tiles[x + tile],
                            )  # fmt: skip
                _improve(
                    lines.ctypes.data, y_pixels.ctypes.data + 8 * top, height,
                    y_lines.ctypes.data, y_shares.ctypes.data, label,
                    best.ctypes.data + 4 * LANES * LANES * tile, number.ctypes.data + 4 * LANES * LANES * tile,
                )  # fmt: skip
            for tile in range(count):
                left = x_start + (x + tile) * LANES
                for row in range(height):
                    for lane in range(min(LANES, x_stop - left)):
                        out[y_start + top + row, left + lane] = number[tile, row, lane]


@_jit
def _possible(low: Any, high: Any, side: int, y_spans: Any, x_spans: Any, possible: Any) -> Any:
    """
    Which classes can be the best of a pixel that is made of these spans of cells, to [150].

    Where it can be one only, that one is returned, and none marked; otherwise -1.
    """
    lowest, highest = np.full(CLASSES, np.inf, np.float32), np.full(CLASSES, -np.inf, np.float32)
    for i in range(len(y_spans)):
        for j in range(len(x_spans)):
            window = y_spans[i, 0] + x_spans[j, 0]
            for row in range(y_spans[i, 1] // side, (y_spans[i, 1] + y_spans[i, 2] - 1) // side + 1):
                for column in range(x_spans[j, 1] // side, (x_spans[j, 1] + x_spans[j, 2] - 1) // side + 1):
                    lows, highs = low[window][row, column], high[window][row, column]
                    for label in range(CLASSES):
                        lowest[label] = min(lowest[label], lows[label])
                        highest[label] = max(highest[label], highs[label])
    reached = lowest.max()  # by the best class of every pixel
    count, only = 0, -1
    for label in range(CLASSES):
        possible[label] = highest[label] >= reached
        if possible[label]:
            count, only = count + 1, label
    if count > 1:
        return -1
    possible[:] = False
    return only


# What numba's compiler does not find by itself, as it must assume that arrays overlap: lanes side by side in registers.
# All addresses are of C-contiguous arrays.
_LONG = ir.IntType(64)
_FLOAT = ir.FloatType()
_LANES = ir.VectorType(_FLOAT, LANES)
_NUMBERS = ir.VectorType(ir.IntType(32), LANES)
_BYTES = LANES * 4


def _splat(builder: Any, scalar: Any, kind: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(_NUMBERS, None))


def _at(builder: Any, address: Any, index: Any, step: Any) -> Any:
    if isinstance(index, int):
        index = ir.Constant(_LONG, index)
    if isinstance(step, int):
        step = ir.Constant(_LONG, step)
    return builder.add(address, builder.mul(index, step))


def _load(builder: Any, address: Any, kind: Any = _LANES) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _product_and_sum(builder: Any, one: Any, other: Any, more: Any) -> Any:
    return builder.fadd(builder.fmul(one, other, flags=("contract",)), more, flags=("contract",))


def _bring(builder: Any, address: Any) -> None:
    """Prefetch: harmless for addresses of nothing."""
    number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # To read, into the second cache (the first is too small for what comes of a full head), data.
    builder.call(function, [builder.inttoptr(address, pointer), *(ir.Constant(number, each) for each in (0, 2, 1))])


def _nothing() -> Any:
    return cgutils.get_null_value(ir.IntType(8).as_pointer())


@_intrinsic
def _bound_columns(
    _context: Any, cells: Any, rows: Any, width: Any, ahead: Any, low: Any, high: Any, traces: Any
) -> Any:
    """Lowest and highest of each of `width` columns of cells over `rows` rows; adds 0 to `traces`, or NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        cells, rows, width, ahead, low, high, traces = arguments
        trace = cgutils.alloca_once_value(builder, _load(builder, traces))
        lowest, highest = cgutils.alloca_once(builder, _LANES), cgutils.alloca_once(builder, _LANES)
        step = builder.mul(width, ir.Constant(_LONG, 4))
        with cgutils.for_range(builder, builder.udiv(width, ir.Constant(_LONG, LANES))) as block:
            first = _at(builder, cells, block.index, _BYTES)
            value = _load(builder, first)
            builder.store(value, lowest)
            builder.store(value, highest)
            with cgutils.for_range(builder, rows) as row:
                place = _at(builder, first, row.index, step)
                _bring(builder, builder.add(place, ahead))
                value = _load(builder, place)
                for kept, order in ((lowest, "<"), (highest, ">")):
                    old = builder.load(kept)
                    builder.store(builder.select(builder.fcmp_ordered(order, value, old), value, old), kept)
                # Zero times a finite number is zero, and times any other is not.
                sum_ = _product_and_sum(builder, value, ir.Constant(_LANES, [0.0] * LANES), builder.load(trace))
                builder.store(sum_, trace)
            _store(builder, builder.load(lowest), _at(builder, low, block.index, _BYTES))
            _store(builder, builder.load(highest), _at(builder, high, block.index, _BYTES))
        _store(builder, builder.load(trace), traces)
        return _nothing()

    return types.void(cells, rows, width, ahead, low, high, traces), generate


@_intrinsic
def _halve(_context: Any, low: Any, high: Any, count: Any) -> Any:
    """The lower, or higher, of each two neighbours, in place: afterwards `count` of each."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        low, high, count = arguments
        even, odd = (ir.Constant(_NUMBERS, list(range(first, 2 * LANES, 2))) for first in (0, 1))
        with cgutils.for_range(builder, builder.udiv(count, ir.Constant(_LONG, LANES))) as block:
            for values, order in ((low, "<"), (high, ">")):
                given = _at(builder, values, block.index, 2 * _BYTES)
                one, two = _load(builder, given), _load(builder, _at(builder, given, 1, _BYTES))
                one, two = builder.shuffle_vector(one, two, even), builder.shuffle_vector(one, two, odd)
                found = builder.select(builder.fcmp_ordered(order, one, two), one, two)
                _store(builder, found, _at(builder, values, block.index, _BYTES))
        return _nothing()

    return types.void(low, high, count), generate


@_intrinsic
def _combine(_context: Any, cells: Any, step: Any, weights: Any, count: Any, target: Any, is_first: Any) -> Any:
    """
    GROUP rows of cells to a tile's pixels, [GROUP, LANES]: their weighted sums, added to the target unless it is first.

    Rows are `step` bytes apart; `count` cells of each count, with weights [count, LANES].
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        cells, step, weights, count, target, is_first = arguments
        totals = []
        for row in range(GROUP):
            old = _load(builder, _at(builder, target, row, _BYTES))
            old = builder.select(is_first, ir.Constant(_LANES, None), old)
            totals.append(cgutils.alloca_once_value(builder, old))
        with cgutils.for_range(builder, count) as cell:
            factor = _load(builder, _at(builder, weights, cell.index, _BYTES))
            for row, total in enumerate(totals):
                source = _at(builder, _at(builder, cells, cell.index, 4), row, step)
                value = _splat(builder, _load(builder, source, _FLOAT), _LANES)
                builder.store(_product_and_sum(builder, value, factor, builder.load(total)), total)
        for row, total in enumerate(totals):
            _store(builder, builder.load(total), _at(builder, target, row, _BYTES))
        return _nothing()

    return types.void(cells, step, weights, count, target, is_first), generate


@_intrinsic
def _prefetch(_context: Any, cells: Any, step: Any, count: Any, length: Any) -> Any:
    """Have `count` pieces of memory brought near, `step` bytes apart, from their first byte to the one at `length`."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        cells, step, count, length = arguments
        with cgutils.for_range(builder, count) as row:
            first = _at(builder, cells, row.index, step)
            _bring(builder, first)
            _bring(builder, builder.add(first, length))
        return _nothing()

    return types.void(cells, step, count, length), generate


@_intrinsic
def _improve(
    _context: Any, lines: Any, pixels: Any, height: Any, entries: Any, shares: Any, label: Any, best: Any, number: Any
) -> Any:
    """A tile's best logits and their classes, [height, LANES], with one more class, of the given lines."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        lines, pixels, height, entries, shares, label, best, number = arguments
        here = _splat(builder, builder.trunc(label, ir.IntType(32)), _NUMBERS)
        total = cgutils.alloca_once(builder, _LANES)
        with cgutils.for_range(builder, height) as row:
            builder.store(ir.Constant(_LANES, None), total)
            begin = _load(builder, _at(builder, pixels, row.index, 8), _LONG)
            end = _load(builder, _at(builder, builder.add(pixels, ir.Constant(_LONG, 8)), row.index, 8), _LONG)
            with cgutils.for_range_slice(builder, begin, end, ir.Constant(_LONG, 1), _LONG) as (k, _):
                line = _load(builder, _at(builder, lines, _load(builder, _at(builder, entries, k, 8), _LONG), _BYTES))
                share = _splat(builder, _load(builder, _at(builder, shares, k, 4), _FLOAT), _LANES)
                builder.store(_product_and_sum(builder, share, line, builder.load(total)), total)
            best_here, number_here = _at(builder, best, row.index, _BYTES), _at(builder, number, row.index, _BYTES)
            value, old = builder.load(total), _load(builder, best_here)
            better = builder.fcmp_ordered(">", value, old)
            _store(builder, builder.select(better, value, old), best_here)
            _store(builder, builder.select(better, here, _load(builder, number_here, _NUMBERS)), number_here)
        return _nothing()

    return types.void(lines, pixels, height, entries, shares, label, best, number), generate
