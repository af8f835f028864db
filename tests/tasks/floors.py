"""A task whose valley is known in closed form: linear regression, whose Hessian is the same everywhere."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Quadratic:
    """Loss (w x - y)^2 / 2; the Hessian of the mean loss is the inputs' second moment, with eigenvalues 4, 1, 0.25."""

    def __init__(self):
        directions, _ = torch.linalg.qr(torch.randn(30, 3, generator=torch.Generator().manual_seed(4)))
        self.x = directions * torch.tensor([4.0, 1.0, 0.25]).sqrt() * 30**0.5
        self.y = self.x @ torch.tensor([[1.0], [2.0], [-1.0]])

    def model(self):
        return nn.Linear(3, 1, bias=False)

    def dataset(self):
        return TensorDataset(self.x, self.y)

    def losses(self, model, batch):
        return (model(batch[0]) - batch[1]).square()[:, 0] / 2
