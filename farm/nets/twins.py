"""
Twins-SVT-L: a vision transformer in four stages, whose blocks look by turns into small squares and far around.

Sizes are constants: this is one network, not a family. Training only parts (dropout, stochastic depth) are left out.
Names of modules and parameters, and their order, are those of the official checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from farm.nets.layers import Attention, Mlp

CLASSES = 1000
HEAD_WIDTH = 32
MLP_RATIO = 4
GROUP = 7  #: side of the squares that local attention stays in
KEY_SIDE = 7  #: global attention has 7 x 7 keys in each stage
EPS = 1e-6  #: but 1e-5, PyTorch's own, after convolutions


class Stage(NamedTuple):
    """What differs between the four."""

    side: int  #: of its square of tokens
    width: int
    blocks: int
    patch: int  #: side of what its embedding makes one token of


STAGES = (
    Stage(side=56, width=128, blocks=2, patch=4),
    Stage(side=28, width=256, blocks=2, patch=2),
    Stage(side=14, width=512, blocks=18, patch=2),
    Stage(side=7, width=1024, blocks=2, patch=2),
)


def _to_map(tokens: Tensor, side: int) -> Tensor:
    """[B, side * side, C] to [B, C, side, side]"""
    return tokens.reshape(-1, side, side, int(tokens.shape[2])).permute(0, 3, 1, 2)


def _to_tokens(features: Tensor) -> Tensor:
    """[B, C, H, W] to [B, H * W, C]"""
    _, width, height, across = (int(size) for size in features.shape)
    return features.permute(0, 2, 3, 1).reshape(-1, height * across, width)


class PatchEmbed(nn.Module):
    """A map [B, channels, H, W] to tokens [B, H * W / patch**2, width]."""

    def __init__(self, channels: int, stage: Stage) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, stage.width, kernel_size=stage.patch, stride=stage.patch)
        self.norm = nn.LayerNorm(stage.width)

    def forward(self, features: Tensor) -> Tensor:
        tokens: Tensor = self.norm(_to_tokens(self.proj(features)))
        return tokens


class GroupAttention(Attention):
    """Attention inside each 7 x 7 square of the tokens [B, side * side, width]."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage.width, stage.width // HEAD_WIDTH)
        self.side = stage.side

    def forward(self, x: Tensor) -> Tensor:
        groups = self.side // GROUP
        if groups == 1:
            return super().forward(x)
        # A row of squares is 7 rows of tokens, and 7 tokens side by side stay so: four dimensions do.
        squares = x.reshape(-1, GROUP, groups, GROUP * self.width).transpose(1, 2)
        attended = super().forward(squares.reshape(-1, GROUP * GROUP, self.width))
        rows = attended.reshape(-1, groups, GROUP, GROUP * self.width).transpose(1, 2)
        return rows.reshape(-1, self.side * self.side, self.width)


class GlobalAttention(nn.Module):
    """Attention of all tokens [B, side * side, width] to 49 keys, each the gist of one square of the tokens."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.side, self.width, self.heads = stage.side, stage.width, stage.width // HEAD_WIDTH
        self.reduction = stage.side // KEY_SIDE
        self.q = nn.Linear(self.width, self.width)
        self.kv = nn.Linear(self.width, 2 * self.width)
        self.proj = nn.Linear(self.width, self.width)
        if self.reduction > 1:
            self.sr = nn.Conv2d(self.width, self.width, kernel_size=self.reduction, stride=self.reduction)
            self.norm = nn.LayerNorm(self.width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.side * self.side
        gist = self.norm(_to_tokens(self.sr(_to_map(x, self.side)))) if self.reduction > 1 else x
        query = self.q(x).reshape(-1, tokens, self.heads, HEAD_WIDTH).transpose(1, 2)
        # The outputs of `kv` lie as [2][heads][32]: one four-dimensional transpose serves keys and values alike.
        heads = self.kv(gist).reshape(-1, KEY_SIDE * KEY_SIDE, 2 * self.heads, HEAD_WIDTH).transpose(1, 2)
        key, value = torch.split(heads, self.heads, dim=1)
        attention = (query * HEAD_WIDTH**-0.5 @ key.transpose(2, 3)).softmax(dim=-1)
        joined = (attention @ value).transpose(1, 2).reshape(-1, tokens, self.width)
        projected: Tensor = self.proj(joined)
        return projected


class Block(nn.Module):
    """A pre-norm transformer block, its attention local or global."""

    def __init__(self, stage: Stage, index: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(stage.width, eps=EPS)
        self.norm2 = nn.LayerNorm(stage.width, eps=EPS)
        self.mlp = Mlp(stage.width, MLP_RATIO * stage.width)
        self.attn = GlobalAttention(stage) if index % 2 else GroupAttention(stage)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        processed: Tensor = x + self.mlp(self.norm2(x))
        return processed


class PositionBlock(nn.Module):
    """Tells tokens [B, side * side, width] of their neighbours, hence of the borders, hence of their place."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.side = stage.side
        self.proj = nn.Sequential(nn.Conv2d(stage.width, stage.width, kernel_size=3, padding=1, groups=stage.width))

    def forward(self, x: Tensor) -> Tensor:
        return x + _to_tokens(self.proj(_to_map(x, self.side)))


class Blocks(nn.ModuleList):
    """Those of a stage, on tokens [B, N, width]; what tells them their place stands behind the first."""

    def forward(self, x: Tensor, position: nn.Module) -> Tensor:
        for index, block in enumerate(self):
            x = block(x)
            if index == 0:
                x = position(x)
        return x


class Twins(nn.Module):
    """Normalised images, float32 [B, 3, 224, 224], to raw scores [B, 1000]."""

    def __init__(self) -> None:
        super().__init__()
        widths = [stage.width for stage in STAGES]
        self.patch_embeds = nn.ModuleList(map(PatchEmbed, [3, *widths], STAGES))
        self.norm = nn.LayerNorm(widths[-1], eps=EPS)
        self.head = nn.Linear(widths[-1], CLASSES)
        self.pos_block = nn.ModuleList(PositionBlock(stage) for stage in STAGES)
        self.blocks = nn.ModuleList(Blocks(Block(stage, index) for index in range(stage.blocks)) for stage in STAGES)

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for stage, embed, blocks, position in zip(STAGES, self.patch_embeds, self.blocks, self.pos_block, strict=True):
            x = blocks(embed(features), position)
            features = _to_map(x, stage.side)
        scores: Tensor = self.head(self.norm(x).mean(dim=1))
        return scores


def build() -> nn.Module:
    return Twins()
