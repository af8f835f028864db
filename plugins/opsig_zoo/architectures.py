"""The paper's convolutional networks for small images: residual networks and VGG-11.

Activations are never in place, and nothing drops out: curvature needs both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from opsig_zoo.transformers import vit


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
    _at_least_one(width)
    return _ResNet(channels, classes, (width, 2 * width, 4 * width, 8 * width), 2, project=True)


def cifar_resnet(
    depth: int, channels: int, size: int, classes: int, width: int = 16, project: bool = False
) -> nn.Module:
    """ResNet-20, 56 or 110 of He et al. 2016, section 4.2, whose shortcuts have no parameters (option A).

    `project`: by 1 x 1 convolutions where the size changes (option B), as many libraries have it.
    """
    _at_least(size, 4, f"resnet{depth}")
    _at_least_one(width)
    return _ResNet(channels, classes, (width, 2 * width, 4 * width), (depth - 2) // 6, project)


def vgg11(channels: int, size: int, classes: int, batch_norm: bool = False, width: int = 64) -> nn.Module:
    """VGG-11 with one linear layer, as used on CIFAR; average pooling to one pixel takes any size from 16 on."""
    _at_least(size, 16, "vgg11")
    _at_least_one(width)
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


def _at_least_one(width: int) -> None:
    if width < 1:
        raise ValueError("width must be at least 1")


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
