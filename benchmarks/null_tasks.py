"""Tasks in which no two samples share a feature, for `noise.py`, and one with a feature under several labels."""

import itertools

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


def network(*sizes: int) -> nn.Sequential:
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Labelled:
    """Inputs (S, D) with labels among `classes`."""

    x: torch.Tensor
    y: torch.Tensor
    classes_count: int

    def model(self) -> nn.Module:
        return network(self.x.shape[1], 48, 48, self.classes_count)

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def label(self, i: int) -> str:
        return str(int(self.y[i]))


class Gaussian(Labelled):
    """One Gaussian with labels drawn at random."""

    def __init__(self, classes: int = 2, seed: int = 0, samples: int = 400, dimensions: int = 20):
        draw = np.random.RandomState(seed + 500)
        self.x = torch.from_numpy(draw.randn(samples, dimensions).astype(np.float32))
        self.y = torch.from_numpy(draw.randint(0, classes, samples))
        self.classes_count = classes


class GaussianImages(Gaussian):
    """The same as pictures of 8 x 8, for a small convolutional network."""

    def __init__(self, classes: int = 3, seed: int = 0, samples: int = 300):
        super().__init__(classes, seed, samples, 64)
        self.x = self.x.view(samples, 1, 8, 8)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128, self.classes_count),
        )  # fmt: skip


class RandomLabels(Labelled):
    """Images of Fashion-MNIST, 14 x 14, with labels drawn at random."""

    def __init__(self, classes: int = 2, seed: int = 0, samples: int = 1000):
        from opsig_zoo import FashionMnist

        images = FashionMnist(size=14).dataset().tensors[0].flatten(1)
        draw = np.random.RandomState(seed + 1300)
        self.x = images[draw.choice(len(images), samples, replace=False)]
        self.y = torch.from_numpy(draw.randint(0, classes, samples))
        self.classes_count = classes


class Clusters(Labelled):
    """Clusters, each of one label: `gap` standard deviations from the middle; two clusters a label."""

    def __init__(self, classes: int = 3, seed: int = 0, gap: float = 6.0, samples: int = 400, dimensions: int = 20):
        draw = np.random.RandomState(seed + 300)
        centres = draw.randn(2 * classes, dimensions)
        centres *= gap / np.linalg.norm(centres, axis=1, keepdims=True)
        place = draw.randint(0, 2 * classes, samples)
        self.x = torch.from_numpy((draw.randn(samples, dimensions) + centres[place]).astype(np.float32))
        self.y = torch.from_numpy(place % classes)
        self.classes_count = classes


class NoiseRegression:
    """A regression on noise."""

    def __init__(self, seed: int = 0, samples: int = 400, dimensions: int = 20):
        draw = np.random.RandomState(seed + 700)
        self.x = torch.from_numpy(draw.randn(samples, dimensions).astype(np.float32))
        self.y = torch.from_numpy(draw.randn(samples).astype(np.float32))

    def model(self) -> nn.Module:
        return network(self.x.shape[1], 48, 48, 1)

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square() / 2


class Offsets(NoiseRegression):
    """A regression: along each of two directions `side` targets lie 2 above and as many 2 below the rest."""

    def __init__(self, seed: int = 0, samples: int = 500, dimensions: int = 20, side: int = 20):
        draw = np.random.RandomState(seed + 900)
        x = draw.randn(samples, dimensions).astype(np.float32)
        y = np.sin(x @ draw.randn(dimensions) / np.sqrt(dimensions) * 1.5) + 0.3 * draw.randn(samples)
        self.side = np.full(samples, -1)
        for feature in range(2):
            way = draw.randn(dimensions)
            way /= np.linalg.norm(way)
            for half, sign in ((0, 1), (1, -1)):
                chosen = draw.choice(np.flatnonzero(self.side < 0), side, replace=False)
                x[chosen] += 6 * way.astype(np.float32)
                y[chosen] += 2 * sign
                self.side[chosen] = 2 * feature + half
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y.astype(np.float32))

    def truth(self) -> np.ndarray:
        return self.side


class FiveLabels(Gaussian):
    """One strong feature, a direction, under each of five labels, `side` samples each, among random labels' samples of
    which every class has a direction of its own; planted side k is the feature under label k."""

    def __init__(self, seed: int = 0, samples: int = 500, dimensions: int = 20, side: int = 20):
        super().__init__(5, seed, samples, dimensions)
        draw = np.random.RandomState(seed + 1100)
        ways = np.linalg.qr(draw.randn(dimensions, dimensions))[0].astype(np.float32)
        self.x += torch.from_numpy(3 * ways[self.y.numpy()])
        self.side = np.full(samples, -1)
        for label in range(5):
            own = np.flatnonzero(self.y.numpy() == label)
            chosen = draw.choice(own, side, replace=False)
            self.x[chosen] += torch.from_numpy(8 * ways[5]) - 3 * torch.from_numpy(ways[label])
            self.side[chosen] = label

    def truth(self) -> np.ndarray:
        return self.side

    def feature(self) -> np.ndarray:
        return np.where(self.side >= 0, 0, -1)
