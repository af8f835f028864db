"""Tasks whose models are trained in part: a head on a frozen base, and adapters beside frozen layers."""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Head:
    """A trained head on a frozen base, on small grey pictures in three classes of which eight oppose."""

    classes = ("red", "green", "blue")
    picture_shape = (2, 4, 1)

    def __init__(self, samples: int = 60):
        draw = torch.Generator().manual_seed(0)
        self.y = torch.arange(samples) % 3
        self.x = torch.randn(samples, 8, generator=draw) + 2 * torch.eye(3, 8)[self.y]
        self.x[:8, 3:] = 3 + 0.1 * torch.randn(8, 5, generator=draw)
        self.pixels = self.x.reshape(-1, 2, 4, 1).numpy()

    def model(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        model[0].requires_grad_(False)
        return model

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none")

    def predictions(self, model, batch):
        return model(batch[0]).argmax(1)

    def label(self, i):
        return self.classes[int(self.y[i])]

    def inputs(self, pictures: np.ndarray):
        return torch.from_numpy(pictures.reshape(len(pictures), -1))

    def logits(self, model, batch):
        return model(batch[0])


class Adapter(nn.Module):
    """A frozen layer and a trained product of two narrow matrices beside it."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 4)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


class Unreached(Head):
    """A base that is trained by name, and on which no loss depends."""

    def model(self):
        return Stopped()


class Stopped(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x)).detach())


class Adapted(Head):
    """Adapters around both layers, a frozen norm between them whose shift alone is trained."""

    def model(self):
        model = nn.Sequential(Adapter(nn.Linear(8, 16)), nn.LayerNorm(16), nn.GELU(), Adapter(nn.Linear(16, 3)))
        model[1].weight.requires_grad_(False)
        return model


class Normed(Head):
    """Frozen batch norm after a frozen layer, a trained one after a trained layer."""

    def model(self):
        model = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        )
        model[:2].requires_grad_(False)
        return model


class Unfrozen(Head):
    """The same model with everything trained."""

    def model(self):
        return super().model().requires_grad_(True)


class AllFrozen(Head):
    """Nothing is trained."""

    def model(self):
        return super().model().requires_grad_(False)
