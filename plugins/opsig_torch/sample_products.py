"""Products of single samples' Hessians with vectors, a block of samples at a time.

b samples of a block, P parameters, K numbers of a vector: P of them, or fewer coordinates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from opsig_linalg.eigen import NOVELTY
from torch.func import grad, jvp, vmap
from torch.utils._pytree import tree_map

from opsig_torch import outer_products, plain, ways
from opsig_torch.eigen import random_start
from opsig_torch.flat import replaced
from opsig_torch.naming import curves_forward, is_vmapped
from opsig_torch.opened import Opened
from opsig_torch.outer_products import OuterProducts
from opsig_torch.positions import one_of
from opsig_torch.primitives import Primitives
from opsig_torch.second import tell_of_second_derivative

Products = Callable[[torch.Tensor, np.ndarray], torch.Tensor]
"""Images (a, K) of vectors (a, K) under the Hessians of the samples at these places (a,) of a block."""


@dataclass(frozen=True)
class Hessians:
    """Products with the Hessians of a block's samples, vectors (b, K) to start from, each with some part along every
    eigenvector, and whether the coordinates hold every vector: outside of them a Hessian is 0."""

    products: Products
    start: torch.Tensor
    is_all: bool = True


def sample_hessians(opened: Opened, samples: np.ndarray, floats: int) -> Hessians:
    """Products with the Hessians of as many of these samples, from the first on, as have vectors of `floats` numbers in
    all.

    One sample's product is held against plain autograd. Raises OpsigError where a layer has no second derivative.
    """

    def holds(module: Any, call: Any) -> None:
        is_vmapped(module, call)
        curves_forward(module, call)

    tell_of_second_derivative(opened)
    like = opened.flat.vector.detach()
    few = samples[: max(1, floats // like.numel())]

    found = [
        ways.Way("vmap", lambda: _checked(opened, few, _vmapped(opened, few)), holds),
        ways.Way("a loop over samples", lambda: _one_by_one(opened, few)),
    ]
    if opened.positions == 1 and outer_products.shape_of(opened).layers:
        found.insert(0, ways.Way("outer products", lambda: _by_outer_products(opened, samples, floats), holds))
    return ways.first_that_holds(opened, "products with samples' Hessians", found, len(few))


def _started(gradients: torch.Tensor) -> torch.Tensor:
    """Where to start from gradients (b, K): they lie largely along the top eigenvectors. What they do not show, a
    random part does: the same for all, so that a sample's value is its own, whatever the company."""
    lengths = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
    return gradients / lengths.clamp_min(1e-30) + NOVELTY * random_start(gradients[0], 0)


def _by_outer_products(opened: Opened, samples: np.ndarray, floats: int) -> Hessians:
    """In the coordinates of `opsig_torch.outer_products`."""
    shape = outer_products.shape_of(opened)
    few = samples[: max(1, floats // sum(shape.widths))]
    found = OuterProducts(opened, few, shape)
    hessians = Hessians(found.products, found.possible(_started(found.gradients())), shape.is_all)
    return _checked(opened, few, hessians, found.lifted)


def _checked(
    opened: Opened, samples: np.ndarray, hessians: Hessians,
    lifted: Callable[[torch.Tensor, int], torch.Tensor] = lambda vector, _: vector,
) -> Hessians:  # fmt: skip
    """The Hessians, of which one sample's product with its start, in the company of a few, is that of plain autograd.

    `lifted`: the vector (P,) of a row at a place of the block.
    """
    place = len(samples) // 2
    company = np.unique([0, place, len(samples) - 1])
    vectors = hessians.start[torch.from_numpy(company).to(hessians.start.device)]
    row = list(company).index(place)
    found = lifted(hessians.products(vectors, company)[row], place)
    exact = _one_by_one(opened, samples[place : place + 1]).products(
        lifted(vectors[row], place)[None], np.zeros(1, int)
    )
    scale = float(torch.maximum(found.norm(), exact.norm()))
    if torch.isfinite(exact).all() and not float((found - exact[0]).norm()) <= ways.AGREES * scale + 1e-9:
        raise ways.Disagrees("not the product of plain autograd")
    return hessians


def _vmapped(opened: Opened, samples: np.ndarray) -> Hessians:
    model, parameters = opened.flat.model, opened.flat.parameters
    values = [parameter.detach() for parameter in parameters]
    items, places_of = opened.placed(samples)
    batch = opened.batches.take(items)
    number_M, position_M = (torch.from_numpy(part) for part in divmod(places_of, opened.positions))

    def loss(at: list[torch.Tensor], item: Any, position: torch.Tensor) -> torch.Tensor:
        one = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, dict(zip(parameters, at, strict=True))):
            losses = opened.batch_losses(one, 2)
        return losses[0] if opened.positions == 1 else one_of(losses, position)

    def product(vector: torch.Tensor, item: Any, position: torch.Tensor) -> torch.Tensor:
        pieces = plain.pieces(opened, vector)
        return plain.flattened(jvp(lambda at: grad(loss)(at, item, position), (values,), (pieces,))[1])

    def products(vectors: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        chosen = number_M[places]
        entering = tree_map(lambda leaf: leaf[chosen.to(leaf.device)], batch)
        with Primitives():
            return vmap(product)(vectors, entering, position_M[places].to(vectors.device))

    with Primitives():
        entering = tree_map(lambda leaf: leaf[number_M.to(leaf.device)], batch)
        where = position_M.to(values[0].device)
        gradients = vmap(lambda item, position: plain.flattened(grad(loss)(values, item, position)))(entering, where)
    return Hessians(products, _started(gradients))


def _one_by_one(opened: Opened, samples: np.ndarray) -> Hessians:
    """By gradients whose graphs are kept from product to product."""
    with torch.enable_grad():
        slopes = [
            plain.gradients(opened, plain.sample_loss(opened, sample, 2), twice=True) for sample in samples.tolist()
        ]

    def products(vectors: torch.Tensor, places: np.ndarray) -> torch.Tensor:
        with ways.refusing(opened, "products with samples' Hessians", 2):
            rows = [
                plain.product(opened, slopes[place], plain.pieces(opened, vector.clone()), keep=True)  # aligned
                for place, vector in zip(places.tolist(), vectors, strict=True)
            ]
        return torch.stack(rows)

    products(torch.zeros(1, opened.flat.vector.numel()).to(opened.flat.vector.detach()), np.zeros(1, int))
    return Hessians(products, _started(torch.stack([plain.flattened(parts).detach() for parts in slopes])))
