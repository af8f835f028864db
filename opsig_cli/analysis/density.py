"""A spectral density as a curve. N nodes, X points of the grid."""

from __future__ import annotations

import numpy as np

WIDTH = 0.01
"""Standard deviation of the Gaussians, as a part of the span of the nodes."""
POINTS = 1000


def smoothed_density(nodes_N: np.ndarray, weights_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Eigenvalues (X,), how many there are per unit of curvature (X,), and the Gaussians' standard deviation.

    A Gaussian stands at every node and holds its weight, so that the area is the sum of the weights: the number of
    eigenvalues, where these are nodes of stochastic Lanczos quadrature. (Ghorbani et al. 2019, arXiv 1901.10159.)

    >>> grid, density, width = smoothed_density(np.array([-1.0, 3.0]), np.array([90.0, 10.0]))
    >>> round(float(density.sum() * (grid[1] - grid[0])), 3), width
    (100.0, 0.04)
    """
    low, high = float(nodes_N.min()), float(nodes_N.max())
    width = WIDTH * (high - low or abs(high) or 1.0)
    grid_X = np.linspace(low - 5 * width, high + 5 * width, POINTS)
    distance_XN = (grid_X[:, None] - nodes_N) / width
    heights_XN = np.exp(-0.5 * distance_XN**2) / (width * np.sqrt(2 * np.pi))
    return grid_X, heights_XN @ weights_N, width
