"""The paper's architectures for small images: residual networks, VGG-11, and a vision transformer.

B batch, C channels, N tokens, D width. Activations are never in place, and nothing drops out: curvature needs both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a shortcut: `project` by 1 x 1 convolution, else by padding with zeros
    (He et al. 2016, options B and A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs
        self.shortcut: nn.Module | None = None
        if project and (stride != 1 or self.extra):
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self.stride != 1 or self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return torch.relu(y + x)


class _ResNet(nn.Sequential):
    def __init__(self, channels: int, classes: int, widths: tuple[int, ...], blocks: int, project: bool):
        layers: list[nn.Module] = [
            nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_Block(inputs, width, 2 if stage and not block else 1, project))
                inputs = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(channels: int, size: int, classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 with a 3 x 3 stem, as used on CIFAR: 11,173,962 parameters for 3 channels and 10 classes."""
    _at_least(size, 8, "resnet18")
    return _ResNet(channels, classes, (width, 2 * width, 4 * width, 8 * width), 2, project=True)


def cifar_resnet(depth: int, channels: int, size: int, classes: int, width: int = 16) -> nn.Module:
    """ResNet-20, 56 or 110 of He et al. 2016, section 4.2, shortcuts without parameters."""
    _at_least(size, 4, f"resnet{depth}")
    return _ResNet(channels, classes, (width, 2 * width, 4 * width), (depth - 2) // 6, project=False)


def vgg11(channels: int, size: int, classes: int, batch_norm: bool = False, width: int = 64) -> nn.Module:
    """VGG-11 with one linear layer, as used on CIFAR; average pooling to one pixel takes any size from 16 on."""
    _at_least(size, 16, "vgg11")
    layers: list[nn.Module] = []
    inputs = channels
    for step in (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8):
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(inputs, step * width, 3, padding=1))
        layers += [nn.BatchNorm2d(step * width)] if batch_norm else []
        layers.append(nn.ReLU())
        inputs = step * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class Attention(nn.Module):
    """Multi-head self-attention on (B, N, D)."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.causal = heads, causal
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        split = self.mix(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Layer(nn.Module):
    """A transformer layer, norm first: attention, then a perceptron four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class _ViT(nn.Module):
    def __init__(self, channels: int, size: int, classes: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.place = nn.Embedding((size // patch) ** 2, width)
        nn.init.normal_(self.place.weight, std=0.02)
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
    if size % patch:
        raise ValueError(f"images of {size} pixels a side do not fall into patches of {patch}")
    return _ViT(channels, size, classes, patch, width, depth, heads)


class GPT(nn.Module):
    """A decoder of GPT-2's shape on (B, N) token ids, embedding and last layer tied; logits (B, N, vocabulary).

    12 layers of width 768 over 50,257 tokens and 1,024 places have 124,439,808 parameters.
    """

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(context, width)
        self.layers = nn.Sequential(*(Layer(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.place.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embed(tokens) + self.place(_places(tokens)))))


def _places(tokens: torch.Tensor) -> torch.Tensor:
    """The place of every token of (B, N, ...), sample by sample, so that each sample's gradient stays apart: (B, N)."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)


def _at_least(size: int, smallest: int, name: str) -> None:
    if size < smallest:
        raise ValueError(f"{name} takes images of {smallest} pixels a side or more, not {size}")


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": resnet18,
    "resnet20": partial(cifar_resnet, 20),
    "resnet56": partial(cifar_resnet, 56),
    "resnet110": partial(cifar_resnet, 110),
    "vgg11": vgg11,
    "vgg11-bn": partial(vgg11, batch_norm=True),
    "vit": vit,
}
