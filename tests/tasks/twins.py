"""The same three small tasks written for torch and for JAX: `twins.py:InTorch:kind=mlp` and `twins.py:InJax:kind=mlp`.

Parameters have the same names and shapes in both, so that a run of one is measured in the other. Pictures are of
Fashion-MNIST; gpt predicts the next byte of a text, and a sample is a sequence.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parent.parent.parent
KINDS = ("mlp", "cnn", "gpt")
SIZES, CHANNELS, CLASSES = (196, 64, 64, 10), (8, 16), 10
VOCABULARY, CONTEXT, EMBEDDED, HEADS, DEPTH = 96, 32, 32, 2, 2
EPSILON = 1e-5


def arrays(kind: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, a row a sample."""
    if kind == "gpt":
        text = np.frombuffer((ROOT / "README.md").read_bytes(), np.uint8)
        tokens = np.clip(text.astype(np.int64) - 32, 0, VOCABULARY - 1)
        starts = np.arange(samples) * (len(tokens) - CONTEXT - 1) // samples
        rows = tokens[starts[:, None] + np.arange(CONTEXT + 1)]
        return rows[:, :-1], rows[:, 1:]
    with np.load(ROOT / "sample_data" / "fashion_mnist_5k.npz") as held:
        pictures, labels = held["images"], held["labels"]
    pictures = pictures[:samples].reshape(-1, 28, 28)[:, ::2, ::2].astype(np.float32) / 255
    return pictures[:, None] - np.float32(0.28), labels[:samples].astype(np.int64)


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters."""
    if kind == "mlp":
        return {
            f"layer{i}.{leaf}": shape
            for i, (a, b) in enumerate(itertools.pairwise(SIZES))
            for leaf, shape in (("weight", (b, a)), ("bias", (b,)))
        }
    if kind == "cnn":
        return {
            "conv0.weight": (CHANNELS[0], 1, 3, 3), "conv0.bias": (CHANNELS[0],),
            "conv1.weight": (CHANNELS[1], CHANNELS[0], 3, 3), "conv1.bias": (CHANNELS[1],),
            "head.weight": (CLASSES, CHANNELS[1] * 16), "head.bias": (CLASSES,),
        }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"tokens.weight": (VOCABULARY, EMBEDDED), "places.weight": (CONTEXT, EMBEDDED)}
    for i in range(DEPTH):
        sizes = {"before": None, "queries": (3 * EMBEDDED, EMBEDDED), "values": (EMBEDDED, EMBEDDED), "between": None,
                 "up": (4 * EMBEDDED, EMBEDDED), "down": (EMBEDDED, 4 * EMBEDDED)}  # fmt: skip
        for name, shape in sizes.items():
            found[f"block{i}.{name}.weight"] = shape or (EMBEDDED,)
            found[f"block{i}.{name}.bias"] = (shape or (EMBEDDED,))[:1]
    return found | {"last.weight": (EMBEDDED,), "last.bias": (EMBEDDED,)}


class Net(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        if kind == "mlp":
            layers = {f"layer{i}": nn.Linear(*sizes) for i, sizes in enumerate(itertools.pairwise(SIZES))}
        elif kind == "cnn":
            first, second = CHANNELS
            layers = {"conv0": nn.Conv2d(1, first, 3, 2, 1), "conv1": nn.Conv2d(first, second, 3, 2, 1)}
            layers["head"] = nn.Linear(16 * second, CLASSES)
        else:
            layers = {"tokens": nn.Embedding(VOCABULARY, EMBEDDED), "places": nn.Embedding(CONTEXT, EMBEDDED)}
            layers |= {f"block{i}": Block() for i in range(DEPTH)} | {"last": nn.LayerNorm(EMBEDDED)}
            nn.init.normal_(layers["tokens"].weight, std=0.1)
            nn.init.normal_(layers["places"].weight, std=0.1)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        if self.kind == "mlp":
            return self.layer2(torch.relu(self.layer1(torch.relu(self.layer0(x.flatten(1))))))
        if self.kind == "cnn":
            return self.head(torch.relu(self.conv1(torch.relu(self.conv0(x)))).flatten(1))
        hidden = self.tokens(x) + self.places.weight
        for i in range(DEPTH):
            hidden = getattr(self, f"block{i}")(hidden)
        return F.linear(self.last(hidden), self.tokens.weight)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.between = nn.LayerNorm(EMBEDDED), nn.LayerNorm(EMBEDDED)
        self.queries, self.values = nn.Linear(EMBEDDED, 3 * EMBEDDED), nn.Linear(EMBEDDED, EMBEDDED)
        self.up, self.down = nn.Linear(EMBEDDED, 4 * EMBEDDED), nn.Linear(4 * EMBEDDED, EMBEDDED)

    def forward(self, hidden):
        heads = self.queries(self.before(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.values(mixed)
        return hidden + self.down(F.gelu(self.up(self.between(hidden))))


class InTorch:
    def __init__(self, kind: str = "mlp", samples: int = 500):
        self.kind = kind
        self.arrays = arrays(kind, samples)
        if kind != "gpt":
            self.classes = [str(i) for i in range(CLASSES)]
            self.predictions = lambda model, batch: model(batch[0]).argmax(1)

    def dataset(self):
        return TensorDataset(*map(torch.from_numpy, self.arrays))

    def model(self):
        return Net(self.kind)

    def losses(self, model, batch):
        x, y = batch
        if self.kind == "gpt":
            return F.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)
        return F.cross_entropy(model(x), y, reduction="none")


class InJax:
    def __init__(self, kind: str = "mlp", samples: int = 500):
        self.kind = kind
        self.arrays = arrays(kind, samples)
        if kind != "gpt":
            self.classes = [str(i) for i in range(CLASSES)]
            self.predictions = lambda params, batch: self.logits(params, batch[0]).argmax(1)

    def data(self):
        return self.arrays

    def init(self, key):
        import jax

        tree: dict = {}
        for name, shape in shapes(self.kind).items():
            key, own = jax.random.split(key)
            *layers, leaf = name.split(".")
            place = tree
            for layer in layers:
                place = place.setdefault(layer, {})
            if len(shape) == 1:
                place[leaf] = jax.numpy.full(shape, 1.0 if leaf == "weight" else 0.0)
            else:
                place[leaf] = jax.random.normal(own, shape) / math.sqrt(math.prod(shape[1:]))
        return tree

    def logits(self, params, x):
        import jax
        from jax import numpy as jnp

        def linear(layer, x):
            return x @ layer["weight"].T + layer["bias"]

        def norm(layer, x):
            centred = x - x.mean(-1, keepdims=True)
            return (
                centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON) * layer["weight"]
                + layer["bias"]
            )

        def conv(layer, x):
            found = jax.lax.conv_general_dilated(
                x, layer["weight"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            return found + layer["bias"][:, None, None]

        if self.kind == "mlp":
            hidden = jax.nn.relu(linear(params["layer0"], x.reshape(len(x), -1)))
            return linear(params["layer2"], jax.nn.relu(linear(params["layer1"], hidden)))
        if self.kind == "cnn":
            hidden = jax.nn.relu(conv(params["conv1"], jax.nn.relu(conv(params["conv0"], x))))
            return linear(params["head"], hidden.reshape(len(x), -1))
        hidden = params["tokens"]["weight"][x] + params["places"]["weight"]
        for i in range(DEPTH):
            block = params[f"block{i}"]
            heads = linear(block["queries"], norm(block["before"], hidden)).reshape(*x.shape, 3, HEADS, -1)
            mixed = jax.nn.dot_product_attention(*(heads[:, :, j] for j in range(3)), is_causal=True)
            hidden = hidden + linear(block["values"], mixed.reshape(hidden.shape))
            up = jax.nn.gelu(linear(block["up"], norm(block["between"], hidden)), approximate=False)
            hidden = hidden + linear(block["down"], up)
        return norm(params["last"], hidden) @ params["tokens"]["weight"].T

    def losses(self, params, batch):
        import jax
        from jax import numpy as jnp

        x, y = batch
        ways = jax.nn.log_softmax(self.logits(params, x))
        losses = -jnp.take_along_axis(ways, y[..., None], -1)[..., 0]
        return losses.mean(1) if self.kind == "gpt" else losses
