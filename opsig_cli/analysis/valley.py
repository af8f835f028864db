"""The paper's toy valley (Fig. 4): two opposing losses in a product of two parameters, and a pull along the floor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

START = (1.0, 0.1)
DIVERGED = 1e12


@dataclass(frozen=True)
class Valley:
    """g = s u v; L_plane = (1 - g)^2 / 2, L_other = (1 + g)^2 / 2;
    L = p (L_plane + L_other) / 2 + (1 - p) (v - V)^2 / 2."""

    probability: float = 0.02
    scale: float = 20.0
    target: float = 2.0

    def losses(self, u: Any, v: float) -> tuple[Any, Any, float]:
        """L_plane, L_other, and the loss of all other samples, (v - V)^2 / 2; u is a number or (U,) of them."""
        g = self.scale * u * v
        return (1 - g) ** 2 / 2, (1 + g) ** 2 / 2, (v - self.target) ** 2 / 2

    def loss(self, u: float, v: float) -> float:
        """The whole loss."""
        plane, other, rest = self.losses(u, v)
        return self.probability * (plane + other) / 2 + (1 - self.probability) * rest

    def gradient(self, u: float, v: float) -> tuple[float, float]:
        """By u and v. The two sides' pull on g is g itself; written as a difference it would freeze u near 1e-18."""
        pull = self.probability * self.scale * (self.scale * u * v)
        return pull * v, pull * u + (1 - self.probability) * (v - self.target)

    def curvature(self, u: float, v: float) -> tuple[float, np.ndarray]:
        """Largest eigenvalue of the Hessian, and its eigenvector (2,)."""
        pull = self.probability * self.scale**2
        matrix = [[pull * v * v, 2 * pull * u * v], [2 * pull * u * v, pull * u * u + 1 - self.probability]]
        values, vectors = np.linalg.eigh(np.array(matrix))
        return float(values[-1]), vectors[:, -1]


def descend(valley: Valley, learning_rate: float, steps: int, start: tuple[float, float] = START) -> np.ndarray:
    """Gradient descent: u and v at every step, the start included, (T, 2); shorter where it diverges."""
    u, v = map(np.float64, start)
    rows = []
    with np.errstate(over="ignore", invalid="ignore"):
        for _ in range(steps + 1):
            if not valley.loss(u, v) <= DIVERGED:
                break
            rows.append((u, v))
            by_u, by_v = valley.gradient(u, v)
            u, v = u - learning_rate * by_u, v - learning_rate * by_v
    return np.array(rows)
