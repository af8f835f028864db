"""How samples' gradients align with those of whole sets: a pass over the samples for all sets.

M samples, G sets, J members of them all, P parameters, O outputs and F inputs of a linear layer.

A mean cosine with a set is the product with the mean of the set's unit gradients, so that no two samples' gradients
meet. Of a linear layer with one position that mean is a sum of J outer products d_j a_j', and a product with it
(a_i . a_j)(d_i . d_j) summed: J (F + O) operations a sample in the place of G F O, and no room for the means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from opsig_torch import captured, plain
from opsig_torch.alignment import (
    directed,
    gradient_norms,
    in_some_way,
    inverse,
    inverse_order,
    loose_blocks,
    plain_gradient,
    require_agreement,
    require_norm,
    sample_batches,
)  # fmt: skip
from opsig_torch.item_passes import grouped
from opsig_torch.layer_gradients import Captured, inner
from opsig_torch.opened import Opened

DIRECTIONS_BYTES = 1 << 30
"""Bound on the mean gradients of sets that are held at a time."""
DIRECTIONS_SHARE = 0.25
"""Part of the memory to spare that they may take."""


@dataclass(frozen=True)
class Members:
    """What enters a layer for every member, (J, F), the gradients that leave it over the norm of the member's whole
    gradient and the size of its set, (J, O), and which set each is in, (J, G) of 0 and 1."""

    inputs_JF: torch.Tensor
    outputs_JO: torch.Tensor
    inside_JG: torch.Tensor

    def products(self, captured: Captured) -> torch.Tensor:
        """Inner products of the samples' gradients of this layer's weight with each set's mean, (M, G) float64."""
        use = captured.uses[0][0]
        across = inner(use.inputs, self.inputs_JF) * inner(use.gradients, self.outputs_JO)
        return across.double() @ self.inside_JG.double()


def mean_cosines(
    opened: Opened, samples: np.ndarray, sets: list[np.ndarray], members_norms: np.ndarray | None = None
) -> np.ndarray:
    """Mean cosine of each sample's gradient with those of each set of samples, (M, G) float64.

    A gradient that vanishes has no direction: as a member it counts as 0, as a sample it is NaN. One pass gives the
    products and the norms, unless the sets' means do not fit DIRECTIONS_BYTES. `members_norms`: of all members'
    gradients, by their index, where they are known.
    """
    order = grouped(opened, samples)
    samples = samples[order]
    norms = np.full(opened.samples, np.nan)
    members = np.unique(np.concatenate(sets))
    norms[members] = directed(gradient_norms(opened, members) if members_norms is None else members_norms)
    parts, first = [], 0
    while first < len(sets):
        some = sets[first:]
        rows = in_some_way(opened, len(samples), lambda plan, some=some: _products(opened, samples, some, norms, plan))
        parts.append(rows)
        first += rows.shape[1] - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        lengths = directed(np.sqrt(parts[0][:, -1]))
        cosines = np.concatenate([part[:, :-1] for part in parts], 1) / lengths[:, None]
    return cosines[inverse_order(order)]


def _products(
    opened: Opened, samples: np.ndarray, sets: list[np.ndarray], norms: np.ndarray, plan: captured.Plan
) -> np.ndarray:
    """Inner products of samples' gradients with the mean unit gradients of as many of the sets, from the first on, as
    memory has room for, and with themselves, (M, G + 1)."""
    outer = _outer(opened, plan, sets)
    apart = set(outer)  # a list would compare values
    dense = [parameter for parameter in opened.flat.parameters if parameter not in apart]
    room = opened.share(DIRECTIONS_SHARE, DIRECTIONS_BYTES)
    fit = max(1, room // max(1, 4 * sum(parameter.numel() for parameter in dense)))
    sets = sets[:fit]
    by_members = _members(opened, plan, outer, sets, norms)
    directions = _mean_unit_gradients(opened, dense, sets, norms)
    groups = len(sets)
    parts = []
    for part in sample_batches(opened, samples, plan):
        total = torch.zeros(len(part), groups + 1, dtype=torch.float64, device=opened.flat.vector.device)
        for found in captured.capture(opened, part, plan, list(plan.covered)):
            known = by_members.get(found.parameter)
            total[:, :groups] += found.products(directions[found.parameter]) if known is None else known.products(found)
            total[:, groups] += found.squares()
        if plan.loose:
            flat = torch.cat([directions[opened.flat.parameter(name)] for name in plan.loose], 1).double()
            for chosen, rows in loose_blocks(opened, part, plan):
                total[chosen, :groups] += rows @ flat.T
                total[chosen, groups] += rows.square().sum(1)
        parts.append(total)
    products = torch.cat(parts).cpu().numpy()
    place = len(samples) // 2
    everything = opened.flat.parameters
    means = _mean_unit_gradients(opened, everything, sets[:1], norms)
    direction = torch.cat([means[parameter][0].double() for parameter in everything])
    exact = plain_gradient(opened, samples[place])
    require_agreement(products[place, 0], float(exact @ direction), float(exact.norm() * direction.norm()))
    require_norm(opened, samples, np.sqrt(products[:, groups]))
    return products


def _outer(opened: Opened, plan: captured.Plan, sets: list[np.ndarray]) -> list[nn.Parameter]:
    """Weights of linear layers with one position for which outer products cost less than means."""
    count = sum(len(members) for members in sets)
    if opened.positions > 1:
        return []
    return [
        parameter
        for parameter, places in plan.covered.items()
        if type(places[0][0]) is nn.Linear
        and places[0][1] == "weight"
        and count * sum(parameter.shape) < len(sets) * parameter.numel()
        and captured.is_once(opened, plan, parameter)
    ]


def _members(
    opened: Opened, plan: captured.Plan, weights: list[nn.Parameter], sets: list[np.ndarray], norms: np.ndarray
) -> dict[nn.Parameter, Members]:
    """The members' part of each of these weights' products."""
    if not weights:
        return {}
    everybody = np.concatenate(sets)
    device = opened.flat.vector.device
    inside = torch.zeros(len(everybody), len(sets), device=device)
    number = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    inside[torch.arange(len(everybody)), torch.from_numpy(number)] = 1
    share = inverse(norms[everybody]) / np.array([len(sets[group]) for group in number])
    rows: dict[nn.Parameter, list[tuple[torch.Tensor, torch.Tensor]]] = {weight: [] for weight in weights}
    first = 0
    for part in sample_batches(opened, everybody):
        scale = torch.from_numpy(share[first : first + len(part)]).to(device)[:, None]
        for found in captured.capture(opened, part, plan, weights):
            use = found.uses[0][0]
            scaled = (use.gradients.double() * scale).to(use.gradients)
            rows[found.parameter].append((use.inputs, scaled))
        first += len(part)
    found = {weight: [torch.cat(column) for column in zip(*parts, strict=True)] for weight, parts in rows.items()}
    return {weight: Members(inputs, outputs, inside) for weight, (inputs, outputs) in found.items()}


def _mean_unit_gradients(
    opened: Opened, parameters: list[nn.Parameter], sets: list[np.ndarray], norms: np.ndarray
) -> dict[nn.Parameter, torch.Tensor]:
    """Mean over each set of its members' gradients of length one, (G, size) for each of these parameters."""
    found = {p: p.detach().new_zeros(len(sets), p.numel()) for p in parameters}
    for group, members in enumerate(sets if parameters else []):
        for chosen in sample_batches(opened, members[grouped(opened, members)]):
            losses = opened.losses_of(chosen)
            weights = torch.from_numpy(inverse(norms[chosen]) / len(members)).to(losses)
            for parameter, gradient in zip(
                parameters, plain.gradients(opened, (losses * weights).sum(), over=parameters), strict=True
            ):
                found[parameter][group] += gradient.reshape(-1)
    return found
