"""
UPerNet on Swin-S: attention within small windows of a picture, and a head that joins its four scales.

Sizes are constants: this is one network, not a family. Training only parts (dropout, stochastic depth, the auxiliary
head) are left out. Names of modules and parameters, and their order, are those of the official checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from farm.nets.layers import Ffn

CLASSES = 150
SIDE = 512  #: of the input, pixels
PATCH = 4
WINDOW = 7
TOKENS = WINDOW * WINDOW  #: of a window
SHIFT = WINDOW // 2
APART = -100.0  #: added between tokens of a window that are no neighbours in the picture
HEAD_WIDTH = 32
CHANNELS = 512  #: of the decode head
CELLS = (1, 2, 3, 6)  #: across, of the pyramid's levels


class Stage(NamedTuple):
    """Blocks of one resolution."""

    side: int  #: of the map, tokens
    width: int
    blocks: int


STAGES = (Stage(128, 96, 2), Stage(64, 192, 2), Stage(32, 384, 18), Stage(16, 768, 2))


class PatchEmbed(nn.Module):
    """Images [B, 3, 512, 512] to a token for each 4 x 4 pixels, [B, 128 * 128, 96]."""

    def __init__(self) -> None:
        super().__init__()
        width = STAGES[0].width
        self.projection = nn.Conv2d(3, width, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        side, width = STAGES[0].side, STAGES[0].width
        tokens: Tensor = self.norm(self.projection(images).permute(0, 2, 3, 1).reshape(-1, side * side, width))
        return tokens


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows [B * windows, 49, width], which may be of a shifted map."""

    relative_position_index: Tensor

    def __init__(self, stage: Stage, *, shifted: bool) -> None:
        super().__init__()
        self.width, self.heads = stage.width, stage.width // HEAD_WIDTH
        self.across, self.shifted = -(-stage.side // WINDOW), shifted
        self.rows = self.across**2 * self.heads if shifted else self.heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * WINDOW - 1) ** 2, self.heads))
        self.register_buffer("relative_position_index", relative_positions())
        self.qkv = nn.Linear(self.width, 3 * self.width)
        self.proj = nn.Linear(self.width, self.width)
        self._frozen: Tensor | None = None

    def freeze(self) -> None:
        self._frozen = self.bias().detach()

    def bias(self) -> Tensor:
        """What is added to the scores of a map's windows: [heads, 49, 49] of any, [windows * heads, 49, 49] of each."""
        pairs = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = pairs.reshape(TOKENS, TOKENS, self.heads).permute(2, 0, 1).contiguous()
        if self.shifted:
            bias = (bias + neighbours(self.across).to(bias.dtype)[:, None]).flatten(0, 1)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        # The outputs of `qkv` lie as [3][heads][head width]: seen as three times as many heads, one four-dimensional
        # transpose serves queries, keys and values alike. Five-dimensional ones are slow on the card.
        heads = self.qkv(x).reshape(-1, TOKENS, 3 * self.heads, HEAD_WIDTH).transpose(1, 2)
        query, key, value = torch.split(heads, self.heads, dim=1)
        bias = self.bias() if self._frozen is None else self._frozen
        scores = query * HEAD_WIDTH**-0.5 @ key.transpose(2, 3)
        attention = (scores.reshape(-1, self.rows, TOKENS, TOKENS) + bias).softmax(dim=-1)
        found = attention.reshape(-1, self.heads, TOKENS, TOKENS) @ value
        projected: Tensor = self.proj(found.transpose(1, 2).reshape(-1, TOKENS, self.width))
        return projected


def relative_positions() -> Tensor:
    """The row of the bias table for each query and key of a window, int64 [49, 49]."""
    row, column = torch.arange(TOKENS) // WINDOW, torch.arange(TOKENS) % WINDOW
    down = row[:, None] - row + WINDOW - 1
    right = column[:, None] - column + WINDOW - 1
    return (2 * WINDOW - 1) * down + right


def neighbours(across: int) -> Tensor:
    """
    0 where query and key of a shifted map's window are neighbours in the picture, else -100: [windows, 49, 49].

    A shifted map's last rows are the picture's first ones, and its last columns likewise.
    """
    side = across * WINDOW
    band = torch.tensor([0] * (side - WINDOW) + [1] * (WINDOW - SHIFT) + [2] * SHIFT)
    areas = windows(3 * band[:, None] + band)
    return torch.where(areas[:, :, None] == areas[:, None], 0.0, APART)


def windows(x: Tensor) -> Tensor:
    """A map [7 * across, 7 * across] cut row by row into [across * across, 49]."""
    across = len(x) // WINDOW
    return x.reshape(across, WINDOW, across, WINDOW).transpose(1, 2).reshape(across * across, TOKENS)


class ShiftedWindows(nn.Module):
    """A map's tokens [B, side * side, width], which see each other if they are of one window."""

    nothing: Tensor
    there: Tensor
    back: Tensor

    def __init__(self, stage: Stage, *, shifted: bool) -> None:
        super().__init__()
        self.width = stage.width
        self.w_msa = WindowAttention(stage, shifted=shifted)
        self.tokens = self.w_msa.across**2 * TOKENS  #: of the map with its padding
        # Padding is not masked: it takes part, as tokens of zeros.
        self.register_buffer("nothing", torch.zeros(1, 1, self.width), persistent=False)
        there, back = moves(stage.side, shifted=shifted)
        self.register_buffer("there", there, persistent=False)
        self.register_buffer("back", back, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # Padding, shifting and cutting only move tokens about: one look-up there, one back. A plain int and copies, so
        # that the padding of the batch is a constant.
        padded = torch.cat((x, torch.cat([self.nothing] * int(x.shape[0]))), dim=1)
        attended: Tensor = self.w_msa(padded.index_select(1, self.there).reshape(-1, TOKENS, self.width))
        return attended.reshape(-1, self.tokens, self.width).index_select(1, self.back)


def moves(side: int, *, shifted: bool) -> tuple[Tensor, Tensor]:
    """
    Where a map's windows take their tokens from, and where the map takes its own from again.

    Both count row by row; tokens that the windows have beyond the map's are taken from behind its last.
    """
    across = -(-side // WINDOW)
    numbers = torch.full((across * WINDOW, across * WINDOW), side * side)
    numbers[:side, :side] = torch.arange(side * side).reshape(side, side)
    if shifted:
        numbers = torch.roll(numbers, (-SHIFT, -SHIFT), (0, 1))
    there = windows(numbers).flatten()
    return there, there.argsort()[: side * side]


class ResidualFfn(Ffn):
    """`Ffn`, to which OpenMMLab's adds what went around it."""

    def forward(self, x: Tensor, around: Tensor) -> Tensor:  # type: ignore[override]
        return around + super().forward(x)


class Block(nn.Module):
    """A pre-norm transformer block on the tokens of a map."""

    def __init__(self, stage: Stage, *, shifted: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.width)
        self.attn = ShiftedWindows(stage, shifted=shifted)
        self.norm2 = nn.LayerNorm(stage.width)
        self.ffn = ResidualFfn(stage.width, 4 * stage.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        processed: Tensor = self.ffn(self.norm2(x), x)
        return processed


class Merging(nn.Module):
    """Each 2 x 2 tokens to one of twice their width: [B, side * side, C] to [B, side * side / 4, 2 * C]."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.side, self.width = stage.side, stage.width
        self.norm = nn.LayerNorm(4 * self.width)
        self.reduction = nn.Linear(4 * self.width, 2 * self.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        half = self.side // 2
        # Of the four the channel counts first, then row, then column. Two transposes of few axes, for the card.
        rows = x.reshape(-1, 2, half, 2 * self.width).transpose(1, 2).reshape(-1, 4, self.width)
        merged: Tensor = self.reduction(self.norm(rows.transpose(1, 2).reshape(-1, half * half, 4 * self.width)))
        return merged


class SwinStage(nn.Module):
    """One resolution's blocks, and the way to the next."""

    def __init__(self, stage: Stage, *, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(stage, shifted=i % 2 == 1) for i in range(stage.blocks))
        self.downsample = None if last else Merging(stage)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the blocks put out, and what of it goes to the next stage."""
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class Swin(nn.Module):
    """Images [B, 3, 512, 512] to the maps of four stages, [B, 96, 128, 128] to [B, 768, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.stages = nn.ModuleList(SwinStage(stage, last=stage is STAGES[-1]) for stage in STAGES)
        for i, stage in enumerate(STAGES):
            self.add_module(f"norm{i}", nn.LayerNorm(stage.width))

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = self.patch_embed(images)
        for i, (stage, blocks) in enumerate(zip(STAGES, self.stages, strict=True)):
            tokens, x = blocks(x)
            # For the head alone: what goes to the next stage has not been through this norm.
            normed = self.get_submodule(f"norm{i}")(tokens)
            maps.append(normed.reshape(-1, stage.side, stage.side, stage.width).permute(0, 3, 1, 2))
        return maps


class Unit(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU: [B, inputs, H, W] to [B, 512, H, W]."""

    def __init__(self, inputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, CHANNELS, kernel_size=kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class JoiningUnit(nn.Module):
    """
    A 3 x 3 unit on a map [B, width, side, side] and smaller ones [B, 512, n, n], resized and concatenated to the first.

    Frozen it resizes nothing. What a kernel makes of a resized map is the sum, over the kernel's nine places, of what
    each place makes of the small map, resized and moved by a pixel; both of that is linear, and along rows and columns
    apart: two products with constant matrices. The same sum, by less than a third of the multiplications.
    """

    def __init__(self, side: int, width: int, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.side, self.width, self.sides = side, width, sides
        self.conv = nn.Conv2d(width + len(sides) * CHANNELS, CHANNELS, kernel_size=3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(CHANNELS)
        self._frozen: Frozen | None = None

    def freeze(self) -> None:
        fused = fuse_conv_bn_eval(self.conv, self.bn)
        kernels = fused.weight.detach()
        bias = torch.zeros(CHANNELS) if fused.bias is None else fused.bias.detach()
        own, *others = torch.split(kernels, [self.width, *[CHANNELS] * len(self.sides)], dim=1)
        rows = [resized_and_moved(n, self.side).to(kernels.dtype) for n in self.sides]
        columns = torch.cat(rows, dim=1).T.contiguous()
        self._frozen = Frozen(own.contiguous(), bias, [by_column(other) for other in others], rows, columns)

    def forward(self, maps: list[Tensor]) -> Tensor:
        if self._frozen is None:
            resized = [resize(x, self.side) for x in maps[1:]]
            return torch.relu(self.bn(self.conv(torch.cat([maps[0], *resized], dim=1))))
        joined = []
        for x, n, kernels, rows in zip(maps[1:], self.sides, self._frozen.kernels, self._frozen.rows, strict=True):
            flat = x.reshape(-1, CHANNELS, n * n)
            joined += [rows @ (kernel @ flat).reshape(-1, CHANNELS, 3 * n, n) for kernel in kernels]
        own = nn.functional.conv2d(maps[0], self._frozen.own, self._frozen.bias, padding=1)
        return torch.relu(own + torch.cat(joined, dim=-1) @ self._frozen.columns)


class Frozen(NamedTuple):
    """What a `JoiningUnit` computes with once its weights are known, its batch norm among them."""

    own: Tensor  #: the first map's kernels, [512, width, 3, 3]
    bias: Tensor
    kernels: list[list[Tensor]]  #: `by_column`, by smaller map
    rows: list[Tensor]  #: [side, 3 * n], by smaller map
    columns: Tensor  #: [3 * the sum of n, side]


def by_column(kernels: Tensor) -> list[Tensor]:
    """Kernels [512, inputs, 3, 3] as matrices [512 * 3, inputs], one for each column."""
    return [kernel.transpose(1, 2).reshape(3 * CHANNELS, -1) for kernel in torch.unbind(kernels, dim=3)]


def resized_and_moved(n: int, side: int) -> Tensor:
    """What resizes n numbers to `side`, for what is before, at and behind each, side by side: [side, 3 * n]"""
    resized = nn.functional.interpolate(torch.eye(n, dtype=torch.float64)[None], size=side, mode="linear")[0].T
    around = nn.functional.pad(resized, (0, 0, 1, 1))
    return torch.cat([around[i : i + side] for i in range(3)], dim=1)


class Pool(nn.Module):
    """The last map [B, 768, 16, 16] to means [B, 768, cells, cells]."""

    def __init__(self, cells: int, *, deployed: bool) -> None:
        super().__init__()
        self.cells = cells
        self.spans = deployed_spans(cells) if deployed else spans(cells)

    def forward(self, x: Tensor) -> Tensor:
        side, width = STAGES[-1].side, STAGES[-1].width
        # Made of plain numbers while tracing, so a constant of the graph; adaptive pooling has no operator there.
        means = torch.tensor([[(a <= i < b) / (b - a) for a, b in self.spans] for i in range(side)], dtype=x.dtype)
        over = torch.kron(means, means)
        return (x.reshape(-1, width, side * side) @ over).reshape(-1, width, self.cells, self.cells)


def spans(cells: int) -> list[tuple[int, int]]:
    """What adaptive pooling takes the means of, along one axis of the last map."""
    side = STAGES[-1].side
    return [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]


def deployed_spans(cells: int) -> list[tuple[int, int]]:
    """What the published graph takes instead, having strides of one length: other ones where there are 6 cells."""
    side = STAGES[-1].side
    stride = side // cells
    return [(i * stride, i * stride + side - (cells - 1) * stride) for i in range(cells)]


def resize(x: Tensor, side: int) -> Tensor:
    """Bilinear, [B, C, n, n] to [B, C, side, side]"""
    # A factor becomes a constant of the graph, a size would come with shape arithmetic.
    return nn.functional.interpolate(x, scale_factor=side / int(x.shape[-1]), mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """The backbone's four maps to raw scores of the classes, [B, 150, 128, 128]."""

    def __init__(self, *, deployed: bool) -> None:
        super().__init__()
        last = STAGES[-1].width
        self.conv_seg = nn.Conv2d(CHANNELS, CLASSES, kernel_size=1)
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Pool(cells, deployed=deployed), Unit(last, kernel=1)) for cells in CELLS
        )
        self.bottleneck = JoiningUnit(STAGES[-1].side, last, CELLS)
        self.lateral_convs = nn.ModuleList(Unit(stage.width, kernel=1) for stage in STAGES[:-1])
        self.fpn_convs = nn.ModuleList(Unit(CHANNELS, kernel=3) for _ in STAGES[:-1])
        self.fpn_bottleneck = JoiningUnit(STAGES[0].side, CHANNELS, tuple(stage.side for stage in STAGES[1:]))

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.bottleneck([maps[-1], *(level(maps[-1]) for level in self.psp_modules)])
        joined = [x]
        for i in (2, 1, 0):
            x = self.lateral_convs[i](maps[i]) + resize(x, STAGES[i].side)
            joined.insert(0, self.fpn_convs[i](x))
        scores: Tensor = self.conv_seg(self.fpn_bottleneck(joined))
        return scores


class UPerNet(nn.Module):
    """Normalised images, float32 [B, 3, 512, 512], to raw scores [B, 150, 512, 512], or 128 x 128 if `small`."""

    def __init__(self, *, small: bool = False, deployed: bool = False) -> None:
        super().__init__()
        self.small = small
        self.backbone = Swin()
        self.decode_head = UPerHead(deployed=deployed)

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.decode_head(self.backbone(images))
        return scores if self.small else resize(scores, SIDE)


def build(head: str = "full") -> nn.Module:
    return UPerNet(small=head == "small", deployed=head == "deployed")
