"""
Focal-Transformer, "fast" small: four stages of windowed attention, each window looking at the tokens nearest to it and
at a coarse map of the whole image.

Sizes are constants: this is one network, not a family. Names of modules and parameters, and their order, are those of
the official checkpoint, misspellings included.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from farm.nets.layers import Mlp

CLASSES = 1000
WIDTHS = (96, 192, 384, 768)
DEPTHS = (2, 2, 18, 2)
SIDES = (56, 28, 14, 7)  #: tokens along each side of a stage's map
HEAD_WIDTH = 32
MLP_RATIO = 4
WINDOW = 7
INSIDE = WINDOW * WINDOW  #: tokens of a window
NEAREST = 128  #: keys that a window has of each level, at most
BIAS_WIDTH = 32  #: inside the networks that make a bias of an offset


def grid(side: int) -> Tensor:
    """(row, column) of the positions of a square map, row by row: int64 [side * side, 2]."""
    along = torch.arange(side)
    return torch.cartesian_prod(along, along)


def window_by_window(side: int) -> Tensor:
    """The row-by-row positions of a map in the order of its windows, each row by row: int64 [side * side]."""
    across = side // WINDOW
    return torch.arange(side * side).reshape(across, WINDOW, across, WINDOW).transpose(1, 2).flatten()


def nearest(centres: Tensor, places: Tensor) -> Tensor:
    """
    The up to 128 of places [P, 2] closest to each of centres [W, 2], closest first: int64 [W, keys].

    Of equally close ones those of lower index. The official checkpoint chose otherwise, and brings its own lists.
    """
    distances = (centres[:, None] - places).square().sum(dim=-1)
    return distances.sort(dim=1, stable=True).indices[:, :NEAREST].clone()


def offsets(centres: Tensor, keys: Tensor) -> Tensor:
    """From each key [W, keys, 2] to each query of its window, in pixels: float32 [W, 49, keys, 2]."""
    inside = grid(WINDOW) - WINDOW // 2
    return (inside[:, None] + (centres[:, None] - keys)[:, None]).float()


class Pool(nn.Module):
    """Windows of tokens [B, rows, columns, 49, width] to a weighted sum each, [B, rows, columns, width, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, INSIDE), 1 / INSIDE))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, windows: Tensor) -> Tensor:
        # From the left: a linear layer would want the tokens of a window last, which is a copy of them all.
        return (self.weight @ windows + self.bias).transpose(3, 4)


class FocalAttention(nn.Module):
    """
    Tokens window by window [B, windows * 49, width] and a coarse one of each window [B, windows, width] to
    [B * windows, 49, width].
    """

    topk_cloest_indice_0: Tensor
    topk_cloest_coords_0: Tensor
    topk_cloest_indice_1: Tensor
    topk_cloest_coords_1: Tensor
    bias: Tensor | None
    rows: Tensor | None

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.width, self.heads, self.side = width, width // HEAD_WIDTH, side
        self.windows = (side // WINDOW) ** 2
        tokens, windows = grid(side), grid(side // WINDOW)
        centres = WINDOW * windows + WINDOW // 2
        fine, coarse = nearest(centres, tokens), nearest(windows, windows)
        self.register_buffer("window_coords", (grid(WINDOW) - WINDOW // 2).reshape(WINDOW, WINDOW, 2))
        self.register_buffer("topk_cloest_indice_0", fine)
        self.register_buffer("topk_cloest_coords_0", offsets(centres, tokens[fine]))
        self.register_buffer("topk_cloest_indice_1", coarse)
        self.register_buffer("topk_cloest_coords_1", offsets(centres, centres[coarse]))
        self.register_buffer("bias", None, persistent=False)
        self.register_buffer("rows", None, persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.coord2rpb_all = nn.ModuleList(
            nn.Sequential(nn.Linear(2, BIAS_WIDTH), nn.ReLU(), nn.Linear(BIAS_WIDTH, self.heads)) for _ in range(2)
        )

    def freeze(self) -> None:
        with torch.no_grad():
            self.bias, self.rows = self._bias(), self._rows()

    def forward(self, x: Tensor, coarse: Tensor) -> Tensor:
        bias = self._bias() if self.bias is None else self.bias
        rows = self._rows() if self.rows is None else self.rows
        groups, keys = self.heads * self.windows, len(rows) // self.windows
        # Three products: the coarse tokens ask nothing, and what comes of one would have to be copied apart.
        of_query, of_key, of_value = (slice(i * self.width, (i + 1) * self.width) for i in range(3))
        scale = HEAD_WIDTH**-0.5  # of the weights, which are fewer than the queries, and constants to the exporter
        everything = torch.cat((x, coarse), dim=1)
        query = self._project(x, self.qkv.weight[of_query] * scale, self.qkv.bias[of_query] * scale)
        key = self._project(everything, self.qkv.weight[of_key], self.qkv.bias[of_key])
        value = self._project(everything, self.qkv.weight[of_value], self.qkv.bias[of_value])
        # Heads first, then windows: what is gathered for all windows, several times the tokens, is not moved again.
        query = query.reshape(-1, groups, INSIDE, HEAD_WIDTH)
        key = key.index_select(2, rows).reshape(-1, groups, keys, HEAD_WIDTH)
        value = value.index_select(2, rows).reshape(-1, groups, keys, HEAD_WIDTH)
        attention = (query @ key.transpose(2, 3) + bias).softmax(dim=-1)
        joined = (attention @ value).reshape(-1, self.heads, self.windows * INSIDE, HEAD_WIDTH).transpose(1, 2)
        projected: Tensor = self.proj(joined.reshape(-1, self.width))
        return projected.reshape(-1, INSIDE, self.width)

    def _project(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[B, tokens, width] to [B, heads, tokens, 32]."""
        # In two dimensions: with more the exporter makes a product and a sum of it, here it is one node.
        projected = nn.functional.linear(x.reshape(-1, self.width), weight, bias)
        return projected.reshape(-1, int(x.shape[1]), self.heads, HEAD_WIDTH).transpose(1, 2)

    def _bias(self) -> Tensor:
        """What the scores get added, [heads * windows, 49, keys]: it depends on no image."""
        fine = self.coord2rpb_all[0](self.topk_cloest_coords_0)
        coarse = self.coord2rpb_all[1](self.topk_cloest_coords_1)
        return torch.cat((fine, coarse), dim=2).permute(3, 0, 1, 2).flatten(0, 1).contiguous()

    def _rows(self) -> Tensor:
        """
        Which keys each window has, one window after the other, [windows * keys].

        Tokens are counted window by window, as they come here, though the lists do so row by row; coarse ones follow.
        """
        fine = window_by_window(self.side).argsort()[self.topk_cloest_indice_0]
        return torch.cat((fine, self.side**2 + self.topk_cloest_indice_1), dim=1).flatten()


class Block(nn.Module):
    """A pre-norm transformer block on tokens [B, side * side, width]: row by row, or both ways window by window."""

    order: Tensor
    back: Tensor

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.width, self.across = width, side // WINDOW
        self.register_buffer("order", window_by_window(side), persistent=False)
        self.register_buffer("back", self.order.argsort(), persistent=False)
        self.pool_layers = nn.ModuleList([Pool()])
        self.norm1 = nn.LayerNorm(width)
        self.attn = FocalAttention(width, side)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(self, x: Tensor, by_window: bool) -> Tensor:
        y = self.norm1(x)
        if not by_window:
            y = y.index_select(1, self.order)
        coarse = self.pool_layers[0](y.reshape(-1, self.across, self.across, INSIDE, self.width))
        attended = self.attn(y, coarse.reshape(-1, self.across**2, self.width))
        attended = attended.reshape(-1, self.across**2 * INSIDE, self.width)
        if not by_window:
            attended = attended.index_select(1, self.back)
        x = x + attended
        processed: Tensor = x + self.mlp(self.norm2(x))
        return processed


class Embedding(nn.Module):
    """A map [B, channels, side, side] to the tokens of a coarser one, row by row: [B, tokens, width]."""

    def __init__(self, channels: int, width: int, *, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Conv2d(channels, width, kernel, stride=stride, padding=padding)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last in four dimensions: onnxruntime then makes the transposes part of its convolution's reorderings.
        x = self.proj(x).permute(0, 2, 3, 1)
        embedded: Tensor = self.norm(x.reshape(-1, int(x.shape[1]) * int(x.shape[2]), self.width))
        return embedded


class Stage(nn.Module):
    """Tokens row by row [B, side * side, width] to the next stage's, [B, (side / 2)^2, 2 * width], or to its own."""

    order: Tensor
    back: Tensor

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.width, self.side = WIDTHS[stage], SIDES[stage]
        self.register_buffer("order", window_by_window(self.side), persistent=False)
        self.register_buffer("back", self.order.argsort(), persistent=False)
        self.by_window = False
        self.blocks = nn.ModuleList(Block(self.width, self.side) for _ in range(DEPTHS[stage]))
        self.downsample: Embedding | None = None
        if stage + 1 < len(WIDTHS):
            self.downsample = Embedding(self.width, WIDTHS[stage + 1], kernel=3, stride=2, padding=1)

    def freeze(self) -> None:
        """Besides constants: reorder the tokens once a stage instead of twice a block. Blocks then put out others."""
        self.by_window = True

    def forward(self, x: Tensor) -> Tensor:
        if self.by_window:
            x = x.index_select(1, self.order)
        for block in self.blocks:
            x = block(x, self.by_window)
        if self.by_window:
            x = x.index_select(1, self.back)
        if self.downsample is not None:
            x = self.downsample(x.reshape(-1, self.side, self.side, self.width).permute(0, 3, 1, 2))
        return x


class Focal(nn.Module):
    """Normalised images, float32 [B, 3, 224, 224], to raw scores [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Embedding(3, WIDTHS[0], kernel=7, stride=4, padding=2)
        self.layers = nn.ModuleList(Stage(stage) for stage in range(len(WIDTHS)))
        self.norm = nn.LayerNorm(WIDTHS[-1])
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(WIDTHS[-1], CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images)
        for stage in self.layers:
            x = stage(x)
        pooled = self.avgpool(self.norm(x).transpose(1, 2))
        scores: Tensor = self.head(pooled.reshape(-1, WIDTHS[-1]))
        return scores


def build() -> nn.Module:
    return Focal()
