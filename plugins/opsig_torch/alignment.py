"""Norms and inner products of per-sample gradients, without an array of M x P. M chosen samples, P parameters.

Parameters of known layers go by what enters and leaves them (`opsig_torch.captured`); loose ones (those of a person's
own layers, of recurrent ones, or used outside of a layer) through vmapped gradients, a block of samples at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from opsig_torch import captured, layer_gradients, plain, ways
from opsig_torch.flat import replaced
from opsig_torch.held_statistics import Frozen, frozen_statistics
from opsig_torch.item_passes import grouped
from opsig_torch.naming import is_vmapped
from opsig_torch.opened import Opened
from opsig_torch.positions import one_of

VANISHES = 1e-15
"""Norm up to which a gradient has no direction: products of such gradients leave the normal numbers of float32."""


def gradient_gram(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """Inner products of the loss gradients of chosen samples at the loaded parameters, (M, M) float64.

    Memory: M x M in float64, layer_gradients.MEMORY_BYTES for a group of layers, and layer_gradients.BLOCK_BYTES;
    where parameters are loose, a quarter of the former for their gradients.
    """
    order = grouped(opened, samples)
    gram = in_some_way(opened, len(samples), lambda plan: _checked_gram(opened, samples[order], plan))
    return gram if opened.positions == 1 else gram[np.ix_(inverse_order(order), inverse_order(order))]


def _checked_gram(opened: Opened, samples: np.ndarray, plan: captured.Plan) -> np.ndarray:
    gram = _gram(opened, samples, plan)
    squares = np.diag(gram)
    a, b = largest(squares), len(samples) // 2
    one, two = (plain_gradient(opened, samples[place]) for place in (a, b))
    size = float(np.sqrt(squares[a] * squares[b]))
    require_agreement(gram[a, b], float(one @ two), size)
    require_agreement(squares[a], float(one @ one))
    return gram


def _gram(opened: Opened, samples: np.ndarray, plan: captured.Plan) -> np.ndarray:
    gram = torch.zeros(len(samples), len(samples), dtype=torch.float64, device=opened.flat.vector.device)
    for group in plan.groups(len(samples), captured.room_of(opened).samples):
        _add_group_gram(opened, samples, plan, group, gram)
    if plan.loose:
        _add_loose_gram(opened, samples, plan, gram)
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
    order = grouped(opened, everybody)
    norms = in_some_way(opened, len(everybody), lambda plan: _norms(opened, everybody[order], plan))
    return norms[inverse_order(order)]


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The places that what stands in this order comes from: `x[order][inverse_order(order)]` is x."""
    return np.argsort(order, kind="stable")


def _norms(opened: Opened, samples: np.ndarray, plan: captured.Plan) -> np.ndarray:
    squares = []
    with frozen_statistics(opened) as frozen:
        parts = list(sample_batches(opened, samples, plan))
        for part in parts:
            total = torch.zeros(len(part), dtype=torch.float64, device=opened.flat.vector.device)
            for parameter in captured.capture(opened, part, plan, list(plan.covered)):
                total += parameter.squares()
            with frozen.held(part):
                for chosen, rows in loose_blocks(opened, part, plan, frozen):
                    total[chosen] += rows.square().sum(1)
            squares.append(total)
        norms = torch.cat(squares).sqrt().cpu().numpy()
        ends = np.cumsum([len(part) for part in parts])
        with frozen.held(parts[int(np.searchsorted(ends, largest(norms), side="right"))]):
            require_norm(opened, samples, norms)
    return norms


def require_norm(opened: Opened, samples: np.ndarray, norms: np.ndarray) -> None:
    """Raise Disagrees where the largest norm of the samples' gradients is not that of plain autograd."""
    place = largest(norms)
    require_agreement(norms[place], float(plain_gradient(opened, samples[place]).norm()))


def sample_batches(opened: Opened, samples: np.ndarray, plan: captured.Plan | None = None) -> Iterator[np.ndarray]:
    """Chosen samples in pieces that go through the network at a time; see `captured.pieces`."""
    for _, part in captured.pieces(opened, samples, plan):
        yield part


def directed(norms: np.ndarray) -> np.ndarray:
    """The norms of gradients, NaN where one vanishes or is not finite: it has no direction."""
    return np.where((norms > VANISHES) & np.isfinite(norms), norms, np.nan)


def inverse(norms: np.ndarray) -> np.ndarray:
    """1 / norm, and 0 for a gradient without a direction: such a member must not void the mean of its set."""
    return np.divide(1, norms, out=np.zeros_like(norms), where=np.isfinite(directed(norms)))


def in_some_way(opened: Opened, samples: int, measure: Callable[[captured.Plan], Any]) -> Any:
    """What `measure` makes of per-sample gradients that are had as a plan says, by the fastest that holds.

    `samples`: of how many. `measure` raises Disagrees where a sample's is not that of autograd.
    """

    def looped() -> Any:
        plan = captured.gradient_plan(opened)
        if not plan.loose:
            raise ways.Disagrees("no gradient is had by vmap")
        return measure(replace(plan, vmapped=False))

    def alone() -> Any:
        names = [name for name, parameter in opened.flat.model.named_parameters() if parameter.requires_grad]
        return measure(captured.Plan({}, {}, names, vmapped=False))

    found = [
        ways.Way("vmap", lambda: measure(captured.gradient_plan(opened)), is_vmapped),
        ways.Way("a loop over samples for some layers", looped),
        ways.Way("a loop over samples", alone),
    ]
    return ways.first_that_holds(opened, "gradients of single samples", found, samples, 1)


def largest(values: np.ndarray) -> int:
    """The place of the largest value; 0 where none is finite."""
    return int(np.nan_to_num(values, nan=-1, posinf=-1, neginf=-1).argmax())


def require_agreement(found: float, exact: float, scale: float = 0.0) -> None:
    """Raise Disagrees where a number is not that of plain autograd, both of them finite."""
    if np.isfinite(exact) and not ways.agree(found, exact, scale):
        raise ways.Disagrees(f"{found:.6g} is {exact:.6g} by plain autograd")


def plain_gradient(opened: Opened, sample: int) -> torch.Tensor:
    """A sample's gradient by plain autograd, alone in its batch, (P,) float64."""
    loss = plain.require_losses(opened.losses_of([int(sample)]), 1)[0]
    return plain.flattened(plain.gradients(opened, loss)).double()


def loose_blocks(
    opened: Opened, samples: np.ndarray, plan: captured.Plan, frozen: Frozen | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Gradients over a plan's loose parameters, (m, their number) float64, of so many samples as memory allows."""
    if not plan.loose:
        return
    size = sum(opened.flat.parameter(name).numel() for name in plan.loose)
    height = _height(opened, 16 * size)
    for first in range(0, len(samples), height):
        chosen = slice(first, min(first + height, len(samples)))
        yield chosen, loose_gradients(opened, samples[chosen], plan, frozen)


def _height(opened: Opened, size: int) -> int:
    """How many samples' gradients of so many bytes are made together: their graphs must fit, too."""
    together = opened.fitting_batch()
    fits = max(1, captured.room_of(opened).samples // size)
    return fits if together == opened.batch_size else min(fits, together)


def loose_gradients(
    opened: Opened, samples: np.ndarray, plan: captured.Plan, frozen: Frozen | None = None
) -> torch.Tensor:
    """Per-sample gradients over a plan's loose parameters, (M, their number) float64."""
    gradients = _vmapped if plan.vmapped else _one_by_one
    return gradients(opened, samples, plan.loose, frozen)


def _vmapped(opened: Opened, samples: np.ndarray, names: list[str], frozen: Frozen | None) -> torch.Tensor:
    model = opened.flat.model
    loose = {name: opened.flat.parameter(name) for name in names}
    constants = {parameter: parameter.detach() for parameter in opened.flat.parameters}

    items, places = opened.placed(samples)
    numbers, positions = (torch.from_numpy(part).to(opened.device) for part in divmod(places, opened.positions))
    batch = opened.batches.take(items)
    if opened.positions > 1:
        batch = tree_map(lambda leaf: leaf[numbers], batch)

    def loss(parameters: dict[str, torch.Tensor], item: Any, position: torch.Tensor) -> torch.Tensor:
        one = tree_map(lambda leaf: leaf.unsqueeze(0), item)
        with replaced(model, constants | {loose[name]: tensor for name, tensor in parameters.items()}):
            losses = opened.batch_losses(one)
        return losses[0] if opened.positions == 1 else one_of(losses, position)

    if frozen is not None:
        frozen.rewind()
    values = {name: parameter.detach() for name, parameter in loose.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be vmapped
        per_sample = vmap(grad(loss), (None, 0, 0))(values, batch, positions)
    return torch.cat([per_sample[name].reshape(len(samples), -1) for name in names], 1).double()


def _one_by_one(opened: Opened, samples: np.ndarray, names: list[str], frozen: Frozen | None) -> torch.Tensor:
    parameters = [opened.flat.parameter(name) for name in names]
    vector = opened.flat.vector
    rows = torch.zeros(len(samples), sum(p.numel() for p in parameters), dtype=torch.float64, device=vector.device)
    for row, sample in zip(rows, samples.tolist(), strict=True):
        if frozen is not None:
            frozen.rewind()
        loss = opened.losses_of([sample])[0]
        if loss.requires_grad:
            row.copy_(plain.flattened(torch.autograd.grad(loss, parameters, materialize_grads=True)))
    return rows


def _add_group_gram(
    opened: Opened, samples: np.ndarray, plan: captured.Plan, group: list[nn.Parameter], gram: torch.Tensor
) -> None:
    """Add inner products over these parameters to the lower triangle, and let go of all that is held for them."""
    rows, weights = captured.gather(opened, samples, plan, group)
    layer_gradients.add_gram(gram, rows)
    for weight in weights:
        weight.add_gram(gram)


def _add_loose_gram(opened: Opened, samples: np.ndarray, plan: captured.Plan, gram: torch.Tensor) -> None:
    """Add inner products over loose parameters to the lower triangle, one block of sample pairs at a time."""
    size = sum(opened.flat.parameter(name).numel() for name in plan.loose)
    height = min(len(samples), _height(opened, 64 * size))
    starts = range(0, len(samples), height)
    for i in starts:
        left = loose_gradients(opened, samples[i : i + height], plan)
        for j in starts[: i // height + 1]:
            right = left if i == j else loose_gradients(opened, samples[j : j + height], plan)
            gram[i : i + len(left), j : j + len(right)] += left @ right.T
