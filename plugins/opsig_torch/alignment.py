"""Norms and inner products of per-sample gradients, without an array of M x P. M chosen samples, P parameters.

Parameters of known layers go by what enters and leaves them (`opsig_torch.captured`); loose ones (those of a person's
own layers, of recurrent ones, or used outside of a layer) through vmapped gradients, a block of samples at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from opsig_torch import captured, layer_gradients
from opsig_torch.flat import replaced
from opsig_torch.frozen import frozen_statistics
from opsig_torch.opened import Opened

VANISHES = 1e-15
"""Norm up to which a gradient has no direction: products of such gradients leave the normal numbers of float32."""
DIRECTIONS_BYTES = 256 << 20
"""Bound on the mean gradients of sets that are held at a time."""


def gradient_gram(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """Inner products of the loss gradients of chosen samples at the loaded parameters, (M, M) float64.

    Memory: M x M in float64, layer_gradients.MEMORY_BYTES for a group of layers, and layer_gradients.BLOCK_BYTES;
    where parameters are loose, a quarter of the former for their gradients.
    """
    plan = captured.gradient_plan(opened)
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=opened.flat.vector.device)
    for group in plan.groups(len(samples)):
        _add_group_gram(opened, samples, plan, group, gram)
    if plan.loose:
        _add_loose_gram(opened, samples, plan.loose, gram)
    found = gram.cpu().numpy()
    for first in range(0, len(found), layer_gradients.TILE):  # the upper triangle, a band at a time
        band = slice(first, first + layer_gradients.TILE)
        found[:first, band] = found[band, :first].T
        found[band, band] = np.tril(found[band, band]) + np.tril(found[band, band], -1).T
    return found


def gradient_norms(opened: Opened, samples: np.ndarray | None = None) -> np.ndarray:
    """Norm of every (chosen) sample's loss gradient at the loaded parameters, (M,) float64.

    With batch norm by chunks a proxy: the chunks' statistics are held fixed, and all samples must be asked for.
    """
    everybody = np.arange(opened.samples) if samples is None else samples
    squares = []
    with frozen_statistics(opened) as frozen:
        plan = captured.gradient_plan(opened)
        for part in sample_batches(opened, everybody):
            total = torch.zeros(len(part), dtype=torch.float64, device=opened.flat.vector.device)
            for parameter in captured.capture(opened, part, plan, list(plan.covered)):
                total += parameter.squares()
            if plan.loose:
                with frozen.held(part):
                    total += loose_gradients(opened, part, plan.loose).square().sum(1)
            squares.append(total)
    return torch.cat(squares).sqrt().cpu().numpy()


def mean_cosines(opened: Opened, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray:
    """Mean cosine of each sample's gradient with those of each set of samples, (M, G) float64.

    A gradient that vanishes has no direction: as a member it counts as 0, as a sample it is NaN.

    It is the product with the mean of the set's unit gradients, so that no two samples' gradients meet.
    """
    norms = np.full(opened.samples, np.nan)
    needed = np.unique(np.concatenate([samples, *sets]))
    norms[needed] = directed(gradient_norms(opened, needed))
    together = max(1, DIRECTIONS_BYTES // (4 * opened.flat.vector.numel()))
    parts = [_products(opened, samples, sets[i : i + together], norms) for i in range(0, len(sets), together)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.concatenate(parts, 1) / norms[samples][:, None]


def _products(opened: Opened, samples: np.ndarray, sets: list[np.ndarray], norms: np.ndarray) -> np.ndarray:
    """Inner products of the samples' gradients with the mean unit gradient of each set, (M, G)."""
    plan = captured.gradient_plan(opened)
    model = opened.flat.model
    directions = [_mean_unit_gradient(opened, members, norms) for members in sets]
    by_parameter = {
        parameter: torch.stack([direction[number].reshape(-1) for direction in directions])
        for number, parameter in enumerate(opened.flat.parameters)
    }
    del directions
    products = []
    for part in sample_batches(opened, samples):
        total = torch.zeros(len(part), len(sets), dtype=torch.float64, device=opened.flat.vector.device)
        for parameter in captured.capture(opened, part, plan, list(plan.covered)):
            total += parameter.products(by_parameter[parameter.parameter])
        if plan.loose:
            flat = torch.cat([by_parameter[model.get_parameter(name)] for name in plan.loose], 1)
            total += loose_gradients(opened, part, plan.loose) @ flat.double().T
        products.append(total)
    return torch.cat(products).cpu().numpy()


def sample_batches(opened: Opened, samples: np.ndarray) -> Iterator[np.ndarray]:
    """Chosen samples in pieces that go through the network at a time."""
    size = opened.inference_batch()
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _mean_unit_gradient(opened: Opened, samples: np.ndarray, norms: np.ndarray) -> list[torch.Tensor]:
    """Mean over the samples of their gradients of length one, for each parameter."""
    parameters = opened.flat.parameters
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for chosen in sample_batches(opened, samples):
        losses = opened.task.losses(opened.flat.model, opened.batches.take(chosen))
        weights = torch.from_numpy(inverse(norms[chosen]) / len(samples)).to(losses)
        gradients = torch.autograd.grad((losses * weights).sum(), parameters, materialize_grads=True)
        for sum_, gradient in zip(total, gradients, strict=True):
            sum_ += gradient
    return total


def directed(norms: np.ndarray) -> np.ndarray:
    """The norms of gradients, NaN where one vanishes or is not finite: it has no direction."""
    return np.where((norms > VANISHES) & np.isfinite(norms), norms, np.nan)


def inverse(norms: np.ndarray) -> np.ndarray:
    """1 / norm, and 0 for a gradient without a direction: such a member must not void the mean of its set."""
    return np.divide(1, norms, out=np.zeros_like(norms), where=np.isfinite(directed(norms)))


def loose_gradients(opened: Opened, samples: np.ndarray, names: list[str]) -> torch.Tensor:
    """Per-sample gradients over the parameters of these names, by vmap, (M, their number) float64."""
    model = opened.flat.model
    loose = {name: model.get_parameter(name) for name in names}
    constants = {parameter: parameter.detach() for parameter in opened.flat.parameters}

    def loss(parameters: dict[str, torch.Tensor], item: Any) -> torch.Tensor:
        batch = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, constants | {loose[name]: tensor for name, tensor in parameters.items()}):
            return opened.task.losses(model, batch)[0]

    values = {name: parameter.detach() for name, parameter in loose.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be vmapped
        per_sample = vmap(grad(loss), (None, 0))(values, opened.batches.take(samples))
    return torch.cat([per_sample[name].reshape(len(samples), -1) for name in names], 1).double()


def _add_group_gram(
    opened: Opened, samples: np.ndarray, plan: captured.Plan, group: list[nn.Parameter], gram: torch.Tensor
) -> None:
    """Add inner products over these parameters to the lower triangle, and let go of all that is held for them."""
    rows, weights = captured.gather(opened, samples, plan, group)
    layer_gradients.add_gram(gram, rows)
    for weight in weights:
        weight.add_gram(gram)


def _add_loose_gram(opened: Opened, samples: np.ndarray, names: list[str], gram: torch.Tensor) -> None:
    """Add inner products over these parameters to the lower triangle, one block of sample pairs at a time."""
    size = sum(opened.flat.model.get_parameter(name).numel() for name in names)
    height = max(1, min(len(samples), layer_gradients.MEMORY_BYTES // (64 * size)))
    starts = range(0, len(samples), height)
    for i in starts:
        left = loose_gradients(opened, samples[i : i + height], names)
        for j in starts[: i // height + 1]:
            right = left if i == j else loose_gradients(opened, samples[j : j + height], names)
            gram[i : i + len(left), j : j + len(right)] += left @ right.T
