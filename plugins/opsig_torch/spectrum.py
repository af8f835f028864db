"""The Hessian's spectral density by stochastic Lanczos quadrature, and per-sample top eigenvalues.

P parameters, R probes, m Lanczos steps, b samples of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opsig_torch.eigen import PIECE, lanczos_matrix, random_start
from opsig_torch.hessian import Hessian
from opsig_torch.opened import Opened
from opsig_torch.sample_products import sample_hessians

PROBES, STEPS = 4, 30
SAMPLE_STEPS = 10
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


def sample_sharpness(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """The most positive eigenvalue of every chosen sample's Hessian at the loaded parameters, (M,) float64.

    SAMPLE_STEPS steps of Lanczos from each sample's gradient, with full reorthogonalisation, a block of samples at a
    time: power iteration would converge to the end that is largest in size.
    """
    size = opened.flat.vector.numel()
    block = max(1, BLOCK_BYTES // (opened.flat.vector.element_size() * size * (SAMPLE_STEPS + 4)))
    steps = min(SAMPLE_STEPS, size)
    found = np.empty(len(samples))
    for first in range(0, len(samples), block):
        start, product = sample_hessians(opened, samples[first : first + block])
        found[first : first + len(start)] = _batched_lanczos(product, start, steps)
    return found


def _batched_lanczos(product: Any, start: torch.Tensor, steps: int) -> np.ndarray:
    """Largest Ritz value of b operators at once from starts (b, P), (b,)."""
    noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(0)).to(start)
    norm = start.norm(dim=1, keepdim=True)
    start = torch.where(norm > 0, start / norm.clamp_min(1e-30), 0) + 1e-3 * noise / noise.norm(dim=1, keepdim=True)
    basis = start.new_zeros(steps, *start.shape)
    basis[0] = start / start.norm(dim=1, keepdim=True)
    matrix = torch.zeros(len(start), steps, steps, dtype=torch.float64)
    for step in range(steps):
        image = product(basis[step])
        along = _inner_products(basis[: step + 1], image)
        matrix[:, step, step] = along[step].cpu()
        image = torch.baddbmm(image[:, None], along.T[:, None].to(image), basis[: step + 1].transpose(0, 1), alpha=-1)[
            :, 0
        ]  # once is enough for so few steps
        if step + 1 < steps:
            length = image.norm(dim=1, keepdim=True)
            alive = length > 1e-6 * matrix[:, step, step].abs().to(length)[:, None].clamp_min(1e-20)
            basis[step + 1] = torch.where(alive, image / length.clamp_min(1e-30), 0)
            beside = torch.where(alive, length, 0)[:, 0].double().cpu()
            matrix[:, step, step + 1] = matrix[:, step + 1, step] = beside
    return torch.linalg.eigvalsh(matrix)[:, -1].numpy()


def _inner_products(rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Inner products of rows (j, b, P) with vectors (b, P), (j, b) float64."""
    total = torch.zeros(rows.shape[:2], dtype=torch.float64, device=rows.device)
    for first in range(0, vectors.shape[1], PIECE):
        piece = slice(first, first + PIECE)
        total += torch.bmm(rows[:, :, piece].transpose(0, 1), vectors[:, piece, None])[..., 0].T
    return total
