"""Models by name: `mlp:width=200,depth=2`. All take the images' channels and side, and the number of outputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from opsig_cli.errors import UsageError
from opsig_cli.tasks import build, parse_spec
from opsig_zoo.architectures import ARCHITECTURES

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "elu": nn.ELU, "silu": nn.SiLU,
}  # fmt: skip


def mlp(
    channels: int, size: int, classes: int, width: int = 200, depth: int = 2, activation: str = "relu"
) -> nn.Module:
    """`depth` hidden layers of `width` units on the flattened image."""
    return dense(channels * size * size, classes, width, depth, activation)


def dense(inputs: int, outputs: int, width: int, depth: int, activation: str) -> nn.Sequential:
    """A multilayer perceptron on flat inputs. Raises ValueError for a size below one or an unknown activation."""
    if width < 1 or depth < 0:
        raise ValueError("width must be at least 1 and depth at least 0")
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), activated(activation)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def cnn(channels: int, size: int, classes: int, width: int = 32, depth: int = 2, activation: str = "relu") -> nn.Module:
    """`depth` 3 x 3 convolutions, the channels doubling, each followed by 2 x 2 average pooling; one linear layer."""
    if width < 1 or depth < 1:
        raise ValueError("width and depth must be at least 1")
    if size < 2**depth:
        raise ValueError(f"images of {size} pixels a side can be pooled {size.bit_length() - 1} times, not {depth}")
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, width, 3, padding=1), activated(activation), nn.AvgPool2d(2)]
        channels, width, size = width, 2 * width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, classes))


def activated(name: str) -> nn.Module:
    """An activation by name. Raises ValueError, listing the known, for another."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no activation is called '{name}'. Known: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


MODELS: dict[str, Callable[..., nn.Module]] = {"mlp": mlp, "cnn": cnn, **ARCHITECTURES}


def image_model(text: str, channels: int, size: int, classes: int) -> nn.Module:
    """The model named by `NAME[:key=value,...]`. Raises UsageError for an unknown model or option."""
    spec = parse_spec(text)
    if spec.name not in MODELS:
        raise UsageError(f"no model is called '{spec.name}'. Known: {', '.join(MODELS)}")
    return build(partial(MODELS[spec.name], channels, size, classes), spec.options, f"model {spec.name}")


def last_features(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The input of the model's last linear layer, flattened to (B, D)."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        model(inputs)
    finally:
        handle.remove()
    return seen[-1].flatten(1)
