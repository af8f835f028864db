"""Tasks of a person's own, small enough to train in a second."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, TensorDataset


class Tiny:
    """Sixty points in three classes, two of which share the inputs of eight samples: they oppose."""

    classes = ("red", "green", "blue")

    def __init__(self, samples: int = 60, norm: bool = False, shared: float = 3.0):
        generator = torch.Generator().manual_seed(1)
        self.y = torch.arange(samples) % 3
        self.x = torch.randn(samples, 5, generator=generator) + 2 * torch.eye(3, 5)[self.y]
        self.x[:8] = torch.tensor([0, 0, 0, shared, shared]) + 0.1 * torch.randn(8, 5, generator=generator)
        self.norm = norm

    def model(self):
        middle = nn.BatchNorm1d(16) if self.norm else nn.Linear(16, 16)
        return nn.Sequential(nn.Linear(5, 16), middle, nn.ReLU(inplace=True), nn.Linear(16, 3))

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none")

    def predictions(self, model, batch):
        return model(batch[0]).argmax(1)

    def label(self, i):
        return self.classes[int(self.y[i])]


class Conv:
    """Pictures through every kind of layer whose per-sample gradients take another road."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(30, 2, 6, 6, generator=generator)
        self.y = torch.arange(30) % 4

    def model(self):
        tied = nn.Linear(8, 8)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.GroupNorm(2, 4),
            nn.Conv2d(4, 4, 1, groups=2),
            nn.Flatten(2),  # (B, 4, 9): four tokens
            nn.Linear(9, 8),
            tied,
            nn.GELU(),
            tied,
            nn.LayerNorm(8),
            nn.Flatten(),
            nn.Linear(32, 4, bias=False),
        )

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none")


class Listed(Tiny):
    """Items made one by one, as most people's datasets are, under a key of their own."""

    class Items(Dataset):
        def __init__(self, task):
            self.task = task

        def __len__(self):
            return len(self.task.x)

        def __getitem__(self, i):
            return {"x": self.task.x[i], "y": self.task.y[i]}

    def dataset(self):
        return Listed.Items(self)

    def losses(self, model, batch):
        return cross_entropy(model(batch["x"]).double(), batch["y"], reduction="none")

    def predictions(self, model, batch):
        return model(batch["x"]).argmax(1)


class Random(Listed):
    """Augmented at random: the same index gives another item."""

    class Items(Listed.Items):
        def __getitem__(self, i):
            return {"x": self.task.x[i] + torch.randn(5), "y": self.task.y[i]}

    def dataset(self):
        return Random.Items(self)


class Reduced(Tiny):
    """Forgets that losses are a sample's own."""

    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class Attend(Tiny):
    """Tokens through an embedding, layer norm and attention, with the embedding tied to the last layer."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.norm = nn.LayerNorm(8)
            self.mix = nn.Linear(8, 24)
            self.out = nn.Linear(8, 7, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            x = self.embed(tokens)
            q, k, v = (part.unsqueeze(1) for part in self.mix(self.norm(x)).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(nn.functional.gelu(x + y.squeeze(1)).mean(1))

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randint(0, 7, (24, 5), generator=generator)
        self.y = torch.arange(24) % 7

    def model(self):
        return Attend.Model()

    def label(self, i):
        return str(int(self.y[i]))


class Dropping(Tiny):
    """Drops at random whatever mode the model is in."""

    def losses(self, model, batch):
        return super().losses(model, batch) * (1 + 0.1 * torch.rand(()))


class Quadratic(Tiny):
    """A loss that is quadratic in the parameters."""

    def model(self):
        return nn.Linear(5, 1)

    def losses(self, model, batch):
        return (model(batch[0])[:, 0] - batch[1]).square() / 2

    def predictions(self, model, batch):
        return model(batch[0])[:, 0].round().int().clamp(0, 2)


class Smooth(Tiny):
    """Can smooth its labels."""

    def smoothed_losses(self, model, batch, smoothing):
        return cross_entropy(model(batch[0]).double(), batch[1], reduction="none", label_smoothing=smoothing)
