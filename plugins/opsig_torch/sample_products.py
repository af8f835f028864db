"""Products of single samples' Hessians with vectors, a block of samples at a time.

b samples of a block, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from opsig_torch import plain, ways
from opsig_torch.flat import replaced
from opsig_torch.naming import curves_forward, is_vmapped
from opsig_torch.opened import Opened
from opsig_torch.primitives import Primitives
from opsig_torch.second import tell_of_second_derivative

Product = Callable[[torch.Tensor], torch.Tensor]
"""Of vectors (b, P) with the Hessian of each one's sample, (b, P)."""


def sample_hessians(opened: Opened, samples: np.ndarray) -> tuple[torch.Tensor, Product]:
    """Gradients (b, P) of these samples' losses at the loaded parameters, and products with their Hessians.

    One sample's product is held against plain autograd. Raises OpsigError where a layer has no second derivative.
    """

    def holds(module: Any, call: Any) -> None:
        is_vmapped(module, call)
        curves_forward(module, call)

    tell_of_second_derivative(opened)
    found = [
        ways.Way("vmap", lambda: _checked(opened, samples), holds),
        ways.Way("a loop over samples", lambda: _one_by_one(opened, samples)),
    ]
    return ways.first_that_holds(opened, "products with samples' Hessians", found, len(samples))


def _checked(opened: Opened, samples: np.ndarray) -> tuple[torch.Tensor, Product]:
    gradients, product = _vmapped(opened, samples)
    place = int(gradients.norm(dim=1).nan_to_num(-1).argmax())
    exact, plain_product = _one_by_one(opened, samples[place : place + 1])
    images, image = product(gradients)[place], plain_product(gradients[place : place + 1])[0]
    for one, other in ((gradients[place], exact[0]), (images, image)):
        if torch.isfinite(other).all() and float((one - other).norm()) > ways.AGREES * float(other.norm()) + 1e-12:
            raise ways.Disagrees("not the product of plain autograd")
    return gradients, product


def _vmapped(opened: Opened, samples: np.ndarray) -> tuple[torch.Tensor, Product]:
    model, parameters = opened.flat.model, opened.flat.parameters
    values = [parameter.detach() for parameter in parameters]
    batch = opened.batches.take(samples)

    def loss(at: list[torch.Tensor], item: Any) -> torch.Tensor:
        one = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, dict(zip(parameters, at, strict=True))):
            return opened.batch_losses(one, 2)[0]

    def gradient(item: Any) -> torch.Tensor:
        return plain.flattened(grad(loss)(values, item))

    def product(vector: torch.Tensor, item: Any) -> torch.Tensor:
        pieces = plain.pieces(opened, vector)
        return plain.flattened(jvp(lambda at: grad(loss)(at, item), (values,), (pieces,))[1])

    def products(vectors: torch.Tensor) -> torch.Tensor:
        with Primitives():
            return vmap(product)(vectors, batch)

    with Primitives():
        return vmap(gradient)(batch), products


def _one_by_one(opened: Opened, samples: np.ndarray) -> tuple[torch.Tensor, Product]:
    """By gradients whose graphs are kept from product to product."""
    with torch.enable_grad():
        slopes = [
            plain.gradients(opened, plain.sample_loss(opened, sample, 2), twice=True) for sample in samples.tolist()
        ]

    def products(vectors: torch.Tensor) -> torch.Tensor:
        with ways.refusing(opened, "products with samples' Hessians", 2):
            rows = [
                plain.product(opened, slope, plain.pieces(opened, vector), keep=True)
                for slope, vector in zip(slopes, vectors, strict=True)
            ]
        return torch.stack(rows)

    return torch.stack([plain.flattened(slope).detach() for slope in slopes]), products
