"""Regression on a Chebyshev polynomial (the paper's Fig. 3, after Cohen et al. 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from opsig_cli.errors import UsageError
from opsig_cli.tasks import build, parse_spec
from opsig_zoo.models import dense


def _mlp(width: int = 50, depth: int = 2, activation: str = "tanh") -> nn.Module:
    return dense(1, 1, width, depth, activation)


class Chebyshev:
    """The polynomial of a degree at evenly spaced points of [-1, 1]. Loss: (f(x) - y)^2 / 2."""

    loss_unit = "squared error"

    def __init__(self, degree: int = 4, samples: int = 20, model: str = "mlp"):
        if degree < 0 or samples < 2:
            raise ValueError("degree must be at least 0 and samples at least 2")
        spec = parse_spec(model)
        if spec.name != "mlp":
            raise UsageError(f"task chebyshev has no model '{spec.name}'. Known: mlp")
        self._options = spec.options
        self.x = np.linspace(-1, 1, samples)
        self.y = np.polynomial.chebyshev.Chebyshev.basis(degree)(self.x)
        self.model()

    def model(self) -> nn.Module:
        """An MLP from one number to one, initialised from torch's seed."""
        return build(_mlp, self._options, "model mlp")

    def dataset(self) -> TensorDataset:
        """Points (S, 1) and values (S, 1)."""
        return TensorDataset(*(torch.tensor(a, dtype=torch.float32)[:, None] for a in (self.x, self.y)))

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Square loss of every point, (B,)."""
        return (model(batch[0]) - batch[1]).double().square()[:, 0] / 2

    def label(self, i: int) -> str:
        """The point."""
        return f"x={self.x[i]:+.3f}"

    def render(self, i: int) -> str:
        """The point and its value."""
        return f"x = {self.x[i]:+.3f}\ny = {self.y[i]:+.3f}"
