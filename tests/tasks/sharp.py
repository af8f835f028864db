"""Tasks whose samples have Hessians of a known kind."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset


class Softmax:
    """Softmax regression: a sample's Hessian is the outer product of x x' and diag(p) - p p', of rank 3."""

    def dataset(self):
        inputs = torch.randn(41, 5, generator=torch.Generator().manual_seed(13))
        labels = torch.randint(0, 4, (41,), generator=torch.Generator().manual_seed(14))
        return TensorDataset(inputs, labels)

    def model(self):
        return nn.Linear(5, 4, bias=False)

    def losses(self, model, batch):
        return cross_entropy(model(batch[0]), batch[1], reduction="none")


class Cosine(Softmax):
    """Near-degenerate: the two largest eigenvalues of a sample differ by about half a percent."""

    def losses(self, model, batch):
        logits = model(batch[0])
        return logits[:, 0].cos() - 0.995 * logits[:, 1].cos() + 1.005 * logits[:, 2].cosh() + logits[:, 3].cosh()


class Concave(Softmax):
    """Negative definite in all that it uses."""

    def losses(self, model, batch):
        weight = model.weight
        return -(model(batch[0]).square().sum(1) + weight.square().sum() + (weight**4).sum() / 10)
