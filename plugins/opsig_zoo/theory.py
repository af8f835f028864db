"""The paper's two toy problems as tasks, so that what `opsig simulate` writes can be measured like any other run.

S samples, B a batch's size. Losses are computed in float64 from the float32 parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from opsig_cli.analysis import valley
from opsig_cli.analysis.linear_descent import PROBABILITY, draw, sides
from opsig_cli.analysis.linear_model import Problem

LOSSES = ("square", "cross-entropy")


class TwoLayer(nn.Module):
    """f = c (b'x + b_o'x_o), begun at given weights."""

    def __init__(self, b: np.ndarray, b_o: np.ndarray):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float32))
        self.b_o = nn.Parameter(torch.tensor(b_o, dtype=torch.float32))
        self.c = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor, x_o: Tensor) -> Tensor:
        """Outputs (B,) float64 for (B, d1) and (B, d2)."""
        return self.c.double() * (x.double() @ self.b.double() + x_o.double() @ self.b_o.double())


class LinearModel:
    """The two-layer linear model with an outlier feature (section 3.3), from the paper's start.

    `samples` are drawn by `seed`; 0 means the population: 1,000 samples, each with the mean loss of its group. `loss`
    is square, or cross-entropy of the sign of y.
    """

    def __init__(
        self, d1: int = 10, d2: int = 20, alpha: float = 100.0, beta_norm: float = 5.0, samples: int = 0,
        loss: str = "square", seed: int = 0,
    ):  # fmt: skip
        if loss not in LOSSES:
            raise ValueError(f"no loss is called '{loss}'. Known: {', '.join(LOSSES)}")
        if not samples and loss != "square":
            raise ValueError("cross-entropy needs samples")
        self.problem = Problem(d1, d2, alpha, beta_norm)
        self.loss = loss
        self.drawn = draw(self.problem, samples, PROBABILITY, seed) if samples else None
        self.side = self.drawn.side if self.drawn else sides(PROBABILITY)

    def model(self) -> nn.Module:
        """The model at its start, which does not depend on torch's seed."""
        epsilon, delta, o, _ = self.problem.start
        b = np.array([epsilon, delta, *np.zeros(self.problem.d1)])[: self.problem.d1]
        d2 = self.problem.d2
        return TwoLayer(self.drawn.b if self.drawn else b, np.full(d2, (o / d2) ** 0.5))

    def dataset(self) -> TensorDataset:
        """x (S, d1), x_o (S, d2) and y (S,); for the population, sides (S,) alone."""
        if self.drawn is None:
            return TensorDataset(torch.from_numpy(self.side))
        outlier = np.repeat(self.drawn.outlier[:, None] / self.problem.d2**0.5, self.problem.d2, 1)
        return TensorDataset(*(torch.from_numpy(array) for array in (self.drawn.x, outlier, self.drawn.y)))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every sample, (B,)."""
        if self.drawn is None:
            return self._population_losses(model, batch[0])
        outputs = model(batch[0], batch[1])
        if self.loss == "square":
            return (outputs - batch[2]).square() / 2
        return softplus(-torch.sign(batch[2]) * outputs)

    def _population_losses(self, model: Any, side: Tensor) -> Tensor:
        b, b_o, c = model.b.double(), model.b_o.double(), model.c.double()
        beta = torch.zeros_like(b)
        beta[0] = self.problem.beta_norm
        used = c * b_o.sum() / self.problem.d2**0.5  # cq
        outlier = self.problem.alpha / (2 * PROBABILITY) * (1 - side * used).square()
        return (c * b - beta).square().sum() / 2 + side.abs() * outlier

    @property
    def loss_unit(self) -> str:
        """Nats for cross-entropy."""
        return "squared error" if self.loss == "square" else "nat"

    def truth(self) -> np.ndarray:
        """Planted sides, (S,)."""
        return np.select([self.side == 1, self.side == -1], [0, 1], -1)

    def label(self, i: int) -> str:
        """Which outliers the sample belongs to."""
        return {1: "outlier +", -1: "outlier -", 0: "other"}[int(self.side[i])]


class Slope(nn.Module):
    """The two parameters of the valley, at their start."""

    def __init__(self):
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.tensor(value)) for value in valley.START)

    def forward(self, side: Tensor, scale: float, target: float) -> Tensor:
        """Loss of every sample, (B,) float64."""
        u, v = self.u.double(), self.v.double()
        opposed = (1 - side * scale * u * v).square() / 2
        return torch.where(side == 0, (v - target).square() / 2, opposed)


class Valley:
    """The toy valley (Fig. 4): 1,000 samples, ten on each of two opposing sides.

    `opsig train` freezes u near 1e-8, where of the sides' two pulls of size 1 float32 leaves no difference; `opsig
    simulate valley` does not.
    """

    def __init__(self):
        self.place = valley.Valley()
        self.side = sides(self.place.probability)

    def model(self) -> nn.Module:
        """u and v at their start, which does not depend on torch's seed."""
        return Slope()

    def dataset(self) -> TensorDataset:
        """Sides (S,)."""
        return TensorDataset(torch.from_numpy(self.side))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Loss of every sample, (B,)."""
        return model(batch[0], self.place.scale, self.place.target)

    def truth(self) -> np.ndarray:
        """Planted sides, (S,)."""
        return np.select([self.side == 1, self.side == -1], [0, 1], -1)

    def label(self, i: int) -> str:
        """Which side the sample is on."""
        return {1: "plane", -1: "other", 0: "all others"}[int(self.side[i])]
