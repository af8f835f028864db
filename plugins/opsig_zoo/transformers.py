"""A small vision transformer, and a GPT of nanoGPT's shape.

B batch, N tokens, D width, H heads. Nothing drops out, so that a sample's loss is a function of the parameters alone.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

STD = 0.02
"""Standard deviation of GPT-2's initial weights."""


class Attention(nn.Module):
    """Multi-head self-attention on (B, N, D)."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool = True):
        super().__init__()
        if width < 1 or heads < 1:
            raise ValueError("width and heads must be at least 1")
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.causal = heads, causal
        self.mix = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        query, key, value = self.mix(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """A transformer layer, norm first: attention, then a perceptron four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool = True):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=bias), nn.LayerNorm(width, bias=bias)
        self.attention = Attention(width, heads, causal, bias)
        self.expand, self.contract = nn.Linear(width, 4 * width, bias), nn.Linear(4 * width, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class _ViT(nn.Module):
    def __init__(self, channels: int, size: int, classes: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Embedding((size // patch) ** 2, width)
        nn.init.normal_(self.place.weight, std=STD)
        self.layers = nn.Sequential(*(Layer(width, heads, causal=False) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers(tokens + self.place(_places(tokens)))).mean(1))


def vit(
    channels: int, size: int, classes: int, patch: int = 4, width: int = 64, depth: int = 4, heads: int = 4
) -> nn.Module:
    """A small vision transformer with mean pooling; the size must be a multiple of the patch."""
    _positive(patch=patch, width=width, depth=depth, heads=heads)
    if size % patch:
        raise ValueError(f"images of {size} pixels a side do not fall into patches of {patch}")
    return _ViT(channels, size, classes, patch, width, depth, heads)


class GPT(nn.Module):
    """A decoder of GPT-2's shape, embedding and last layer tied, as nanoGPT builds it.

    12 layers of width 768 over 50,257 tokens and 1,024 places have 124,439,808 parameters. `bias` is nanoGPT's: whether
    linear layers and norms have one. Weights start as GPT-2's do (Radford et al. 2019, section 2.3): normal with
    standard deviation .02, those that write into the residual stream .02 / sqrt(2 depth), biases 0.
    Raises ValueError for a size below one or a width that the heads do not divide.
    """

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int, bias: bool = True):
        super().__init__()
        _positive(vocabulary=vocabulary, context=context, depth=depth, width=width, heads=heads)
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads, causal=True, bias=bias) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                residual = name.endswith(("attention.out.weight", "contract.weight"))
                nn.init.normal_(parameter, std=STD / math.sqrt(2 * depth) if residual else STD)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token after every one of (B, N) token ids, (B, N, vocabulary)."""
        return self.head(self.norm(self.layers(self.embed(tokens) + self.place(_places(tokens)))))


def _places(tokens: torch.Tensor) -> torch.Tensor:
    """The place of every token of (B, N, ...), sample by sample, so that each sample's gradient stays apart: (B, N)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def _positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1")
