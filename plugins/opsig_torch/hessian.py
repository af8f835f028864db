"""Products with the Hessian of the training loss, and its most positive eigenpairs. P parameters, K eigenpairs.

A product is the gradient of the gradient, batch by batch, of layers as `opsig_torch.kept_derivatives` has them. Where
the graph of all batches fits in GRAPH_BYTES it is kept from product to product, so that each costs two backward passes;
elsewhere the forward pass and the gradient are made anew. Nothing goes through `.grad`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from opsig_linalg.eigen import LIMIT, REMEMBERED, ROOM, WHOLE, Memory, Solution, novelty

from opsig_cli.backends import worded
from opsig_cli.errors import OpsigError
from opsig_torch import plain, small_basis, ways
from opsig_torch.channel_scales import ChannelScales
from opsig_torch.eigen import TorchSpace, top_eigenpairs
from opsig_torch.kept_derivatives import KeptDerivatives
from opsig_torch.memory import let_go
from opsig_torch.opened import GRAPH_SHARE, Opened
from opsig_torch.saved import saved_bytes
from opsig_torch.second import tell_of_second_derivative

GRAPH_BYTES = 1 << 30
"""Bound on the graphs that are kept."""
UNCUT_SHARE = 0.25
"""Part of the memory to spare that they may take where no batch has to be cut."""
LARGE_BYTES = 1 << 30
"""Size of a basis from which on it is worth the time to look for memory that can be let go of."""
FEW = 4
"""Items whose product is made both by kept derivatives and by plain autograd, once a session."""
HOLDS = 1e-3
"""Relative difference up to which these are the same."""
PRODUCT_VECTORS = 6
"""Vectors that a product takes: the gradient with its graph, derivatives of that as parts and as one, their sum, and
the solver's own beside its basis."""
MARGIN = 1 / 32
"""Part of the memory that is left to what the C library keeps of freed pieces within a product."""


class Hessian:
    """The Hessian of the mean training loss at the loaded parameters, as an operator on (P,) vectors.

    `scale` (P,): the operator is diag(scale) H diag(scale), as for a preconditioned optimizer. `products` counts.
    Raises OpsigError where the task's losses differ from one evaluation to the next, or are not finite.
    """

    def __init__(self, opened: Opened, scale: torch.Tensor | None = None):
        self.products = 0
        self._opened = opened
        self._scale = scale
        self._kept: list[tuple[torch.Tensor, ...]] | None = None
        self._check_repeatable()
        tell_of_second_derivative(opened)

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """H v, (P,)."""
        self.products += 1
        opened = self._opened
        opened.announce("product", vector)
        scaled = vector if self._scale is None else vector * self._scale
        direction = plain.pieces(opened, scaled)
        with ways.refusing(opened, "the Hessian", 2):
            terms = (plain.product(opened, gradients, direction, keep) for gradients, keep in self._gradients())
            total = opened.total(terms, vector)
        return total if self._scale is None else total * self._scale

    def gradient(self) -> torch.Tensor:
        """Gradient of the mean training loss, (P,), times the scale; its graphs serve the products where they fit."""
        self._opened.announce("gradient")
        with ways.refusing(self._opened, "the Hessian", 2):
            terms = (plain.flattened(parts).detach() for parts, _ in self._gradients())
            total = self._opened.total(terms, self._opened.flat.vector.detach())
        return total if self._scale is None else total * self._scale

    def _gradients(self) -> Iterator[tuple[tuple[torch.Tensor, ...], bool]]:
        """Every batch's gradients with their graph, and whether the graph is kept."""
        if self._kept is not None:
            for gradients in self._kept:
                yield gradients, True
                self._opened.passes.heard(1 / len(self._kept))
            return
        opened = self._opened
        size = _piece(opened)
        cut = opened.batches.divisible and size < opened.batch_size
        count = len(opened.batches.slices(size if cut else None))
        keep: bool | None = None
        kept = []
        for indices, batch in opened.batches.in_pieces(size) if cut else opened.batches:
            with nullcontext() if "unheard" in opened.kept else saved_bytes() as saved:
                gradients = self._of_batch(indices, batch)
            if keep is None:
                room = self._graph_room(opened.fitting_batch(2) < opened.batch_size)
                keep = saved is not None and saved.total * count <= room
            if keep:
                kept.append(gradients)
            yield gradients, keep
        if keep:
            self._kept = kept

    def _of_batch(self, indices: slice, batch: Any) -> tuple[torch.Tensor, ...]:
        """A batch's gradients with their graph, by plain autograd from now on where kept derivatives raise, as of items
        for which a model does what it does for none of the first ones."""
        layers = self._layers()
        try:
            return self._of_layers(layers, indices, batch)
        except (OpsigError, MemoryError):
            raise
        except Exception:
            if isinstance(layers, ChannelScales):
                raise
        self._opened.kept["kept derivatives"] = False
        return self._of_layers(ChannelScales(), indices, batch)

    def _of_layers(
        self, layers: KeptDerivatives | ChannelScales, indices: slice, batch: Any
    ) -> tuple[torch.Tensor, ...]:  # fmt: skip
        opened = self._opened
        with layers:
            losses = opened.batch_losses(batch, 2)
        losses = opened.counted(losses, indices)
        _require_finite(losses.detach(), indices)
        gradients = plain.gradients(opened, losses.sum() / opened.target_count, twice=True)
        if isinstance(layers, KeptDerivatives):
            plain.require_differentiable(gradients)  # torch itself may take a derivative of these for a constant
        return gradients

    def _layers(self) -> KeptDerivatives | ChannelScales:
        """How layers are run: with kept derivatives where a few items' product is that of plain autograd."""
        known = self._opened.kept
        if "kept derivatives" not in known:
            known["kept derivatives"] = self._kept_derivatives_hold()
        return KeptDerivatives() if known["kept derivatives"] else ChannelScales()

    def _kept_derivatives_hold(self) -> bool:
        opened = self._opened
        if opened.device != "cpu":
            return False
        batch = opened.batches.take(range(min(FEW, opened.items)))
        try:
            images = []
            for layers in (nullcontext(), KeptDerivatives()):
                with torch.enable_grad():
                    with layers:
                        loss = opened.batch_losses(batch, 2).nansum()
                    slopes = plain.gradients(opened, loss, twice=True)
                    plain.require_differentiable(slopes)
                    along = [slope.detach() for slope in slopes]
                    images.append(plain.product(opened, slopes, along).double())
        except (OpsigError, MemoryError):
            raise
        except Exception:  # a model that takes derivatives itself, or by torch.func
            return False
        exact, found = images
        return bool((found - exact).norm() <= HOLDS * exact.norm())

    def _graph_room(self, cut: bool) -> int:
        """Bytes of graphs that are kept where memory is short: what a batch's may take, less the solver's vectors."""
        if not cut:
            return self._opened.share(UNCUT_SHARE, GRAPH_BYTES)
        vectors = 2 * ROOM * self._opened.flat.vector.nbytes
        return self._opened.share(GRAPH_SHARE, GRAPH_BYTES) - vectors

    def _check_repeatable(self) -> None:
        opened = self._opened
        if "repeatable" in opened.kept:
            return
        with torch.no_grad():
            indices, batch = next(opened.batches.in_pieces(opened.fitting_batch(2)))
            first, second = (opened.counted(opened.batch_losses(batch), indices) for _ in range(2))
        _require_finite(first, indices)
        if not torch.equal(first, second):
            raise OpsigError(
                "the task's losses differ when they are evaluated again at the same parameters. "
                "Curvature needs a deterministic loss: turn dropout and random augmentation off"
            )
        opened.kept["repeatable"] = True


def _require_finite(losses: torch.Tensor, indices: slice) -> None:
    """Raise OpsigError where one of a batch's losses, which are those of these samples, is not finite."""
    broken = torch.nonzero(~torch.isfinite(losses)).flatten()
    if 0 < len(broken) <= len(losses) / 2:
        raise OpsigError(
            f"the loss of sample {indices.start + int(broken[0])} is not finite at this checkpoint, so that the "
            "whole loss has no curvature. Look at this part of the data"
        )
    if len(broken):
        raise OpsigError("losses are not finite at this checkpoint: the run has diverged. Choose others with --steps")


def _piece(opened: Opened) -> int:
    """Items of which a graph is made at a time: what fits, and convolutions on the CPU in small batches, by which a
    batch is cut evenly, so that sums are the same however batches are shared among processes."""
    fits, small = opened.fitting_batch(2), opened.inference_batch()
    if opened.couples_samples or fits < small or small == opened.batch_size:
        return fits
    even = [size for size in range((small + 1) // 2, small + 1) if opened.batch_size % size == 0]
    return max(even, default=fits)


def solve(
    opened: Opened, count: int, tolerance: float, seed: int, memory: Memory | None = None,
    scale: torch.Tensor | None = None,
) -> Solution:  # fmt: skip
    """The `count` most positive eigenpairs of the loaded parameters' Hessian.

    The start is what `memory` of a checkpoint near by names, else the gradient, which lies largely along the top
    eigenvectors; with a random part from `seed`. For a single eigenpair the memory is the method's model of the Hessian
    too, which saves products; for several it takes more than it saves. All others go by Lanczos's method, which holds
    half the vectors. Raises OpsigError for a tolerance that cannot be met, or where the Hessian is not finite.
    """
    hessian = Hessian(opened, scale)
    vectors = vectors_that_fit(opened)
    few = vectors < 2 * basis_room(count, opened.flat.vector.numel())
    if few and vectors < (needed := small_basis.least_room(count)):
        size = 4 * opened.flat.vector.numel()
        raise OpsigError(
            f"{count} eigenpairs of {size // 4:,} parameters need {worded(needed * size)} for vectors, "
            f"and {worded(max(0, vectors) * size)} of {worded(opened.bound())} are left for them. Give --memory "
            f"{worded(opened.bound() + (needed - vectors) * size).replace(' ', '')} or more, or a smaller -k"
        )

    def start() -> torch.Tensor:
        found = hessian.gradient() if memory is None else memory.start(TorchSpace(opened.flat.vector.detach()), count)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(found.shape, generator=generator).to(found)
        found = found / torch.linalg.vector_norm(found).clamp_min(1e-30)
        return found.add_(noise, alpha=novelty(memory) / found.numel() ** 0.5)

    def product(vector: torch.Tensor) -> torch.Tensor:
        if vectors * vector.nbytes > LARGE_BYTES:
            let_go()  # what the product before has left in pieces
        return hessian(vector)

    size = opened.flat.vector.numel()
    try:
        if (count == 1 and memory is not None and not few) or size <= WHOLE:
            return top_eigenpairs(hessian, start(), count, tolerance, memory=memory if count == 1 else None)
        room, remembered = min(vectors, basis_room(count, size)), 0 if few else REMEMBERED
        return small_basis.top_eigenpairs(
            product if few else hessian, start(), count, tolerance, room, remembered=remembered
        )
    except ValueError as error:
        raise OpsigError(str(error)) from error


def basis_room(count: int, size: int) -> int:
    """How many basis vectors a solve for `count` eigenpairs keeps where memory does not matter."""
    return size if size <= LIMIT else min(size, ROOM + 4 * count)


def vectors_that_fit(opened: Opened) -> int:
    """How many vectors (P,) there is room for besides a product: its gradient, its terms, and a batch's graph."""
    size = opened.flat.vector.element_size() * opened.flat.vector.numel()
    if 2 * ROOM * size > LARGE_BYTES:
        let_go()
    graph = min(opened.fitting_batch(2), opened.items) * opened.kept.get(("item bytes", 2), 0)
    return int((opened.room() - graph - MARGIN * opened.bound()) // size) - PRODUCT_VECTORS
