"""The Hessian's spectral density by stochastic Lanczos quadrature, and per-sample top eigenvalues.

P parameters, R probes, m Lanczos steps, b samples of a block.
"""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch

from opsig_cli.errors import OpsigError
from opsig_torch.batched_lanczos import ROOM, Largest, largest_eigenvalues
from opsig_torch.eigen import SMALLEST_TOLERANCE, lanczos_matrix, random_start
from opsig_torch.hessian import Hessian
from opsig_torch.opened import Opened
from opsig_torch.sample_products import sample_hessians

PROBES, STEPS = 4, 30
SAMPLE_LIMIT = 200
"""Products after which a sample is given up, and its residual says so."""
BLOCK_BYTES = 64 << 20
"""Bound on the bases of a block of samples."""


def spectral_density(opened: Opened) -> tuple[np.ndarray, np.ndarray, float]:
    """Nodes and weights (R, m) whose weighted sums estimate traces of functions of H, and the trace's standard error.

    The weights of all probes sum to P. (Ghorbani et al. 2019, arXiv 1901.10159.)
    """
    like = opened.flat.vector.detach()
    hessian = Hessian(opened)
    size = like.numel()
    nodes, weights = np.zeros((2, PROBES, min(STEPS, size)))
    for probe in range(PROBES):
        diagonal, beside = lanczos_matrix(hessian, random_start(like, probe), min(STEPS, size))
        matrix = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(matrix)
        nodes[probe, : len(values)] = values
        weights[probe, : len(values)] = vectors[0] ** 2 * size / PROBES
    traces = PROBES * (nodes * weights).sum(1)
    return nodes, weights, float(traces.std(ddof=1) / np.sqrt(PROBES))


def sample_sharpness(opened: Opened, samples: np.ndarray, tolerance: float) -> Largest:
    """The most positive eigenvalue of every chosen sample's Hessian at the loaded parameters, with its residual.

    See `opsig_torch.batched_lanczos`; SAMPLE_LIMIT products are the most that a sample gets. Raises OpsigError for a
    tolerance that the precision cannot reach.
    """
    like = opened.flat.vector.detach()
    if like.dtype == torch.float32 and tolerance < SMALLEST_TOLERANCE:
        raise OpsigError(f"a tolerance of {tolerance:g} cannot be met in float32. Use {SMALLEST_TOLERANCE:g} or more")
    block = block_size(opened)
    start = random_start(like, 0)  # the same for all: a sample's value is its own, whatever the company

    found = []
    for first in range(0, len(samples), block):
        chosen = samples[first : first + block]
        products = sample_hessians(opened, chosen)
        found.append(largest_eigenvalues(products, start.expand(len(chosen), -1), tolerance, SAMPLE_LIMIT))
    return Largest(*(np.concatenate(parts) for parts in zip(*map(astuple, found), strict=True)))


def block_size(opened: Opened) -> int:
    """How many samples are solved for at a time."""
    like = opened.flat.vector
    return max(1, BLOCK_BYTES // (like.element_size() * like.numel() * (ROOM + 4)))
