"""Which parameters' per-sample gradients are had from layers' inputs and outputs, and passes that capture these.

M samples, P parameters. One backward pass to the layers' outputs is all that is taken from autograd. `plan` finds the
parameters for which `opsig_torch.layer_gradients` holds, and holds each against autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from opsig_torch import layer_gradients, plain
from opsig_torch.eigen import random_start
from opsig_torch.held_statistics import frozen_statistics
from opsig_torch.layer_gradients import NORMS, Captured, Use, is_transposed
from opsig_torch.opened import Opened

AGREES = 1e-3
"""Relative error up to which a captured gradient is the one of autograd."""
SHAKEN = 0.01
"""Size of the noise that is added to parameters while this is found out, relative to theirs."""


@dataclass(frozen=True)
class Plan:
    """`covered`: parameters with captured gradients, each with the (module, name)s that use it and what one sample's
    activations take in floats. `loose`: names of all other parameters, whose gradients are had by vmap, or, where that
    does not hold, one sample after the other."""

    covered: dict[nn.Parameter, list[tuple[nn.Module, str]]]
    floats: dict[nn.Parameter, int]
    loose: list[str]
    vmapped: bool = True

    def groups(self, samples: int) -> list[list[nn.Parameter]]:
        """Consecutive parameters of which what is held of so many samples fits the budget."""
        groups: list[list[nn.Parameter]] = []
        room = 0
        for parameter, floats in self.floats.items():
            need = min(floats, parameter.numel()) * samples * 4
            if not groups or need > room:
                groups.append([])
                room = layer_gradients.MEMORY_BYTES
            groups[-1].append(parameter)
            room -= need
        return groups

    def is_small(self, parameter: nn.Parameter) -> bool:
        """Whether a sample's gradient takes no more room than the activations that it is made from."""
        return parameter.numel() <= self.floats[parameter]


def gradient_plan(opened: Opened) -> Plan:
    """How each parameter's per-sample gradients are had, found at the first call."""
    if "plan" not in opened.kept:
        with frozen_statistics(opened):
            opened.kept["plan"] = plan(opened)
    return opened.kept["plan"]


def plan(opened: Opened) -> Plan:
    """Which parameters' gradients can be captured: every use goes through a layer of a known kind that keeps samples
    apart, and the gradients of two samples are those of autograd.

    The parameters are shaken meanwhile: where they are zero, as at the beginning of a layer's training, gradients
    vanish and agree whatever they are made from.
    """
    vector = opened.flat.vector.detach()
    before = vector.clone()
    size = SHAKEN * vector.square().mean(dtype=torch.float64).sqrt().clamp_min(0.1)
    vector += size.to(vector) * random_start(vector, 0) * vector.numel() ** 0.5
    try:
        return _plan(opened)
    finally:
        vector.copy_(before)


def _plan(opened: Opened) -> Plan:
    model = opened.flat.model
    holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            holders.setdefault(parameter, []).append((module, name))
    known = {p: places for p, places in holders.items() if len({_kind(m, n) for m, n in places} - {None}) == 1}
    known = {p: places for p, places in known.items() if all(_kind(m, n) for m, n in places)}
    known = {p: places for p, places in known.items() if len({is_transposed(m) for m, _ in places}) == 1}
    two = np.unique([0, opened.samples - 1])
    modules = list(dict.fromkeys(module for places in known.values() for module, _ in places))
    uses = _captured_uses(opened, two, modules)
    known = {p: places for p, places in known.items() if all(_separate(uses[m], len(two)) for m, _ in places)}
    losses = opened.batch_losses(opened.batches.take(two))
    parameters = opened.flat.parameters
    exact = [plain.gradients(opened, loss, keep=True) for loss in losses]
    covered = {}
    for number, parameter in enumerate(parameters):
        if parameter in known:
            found = _collect(parameter, known[parameter], uses)
            if all(_agree(found.sample_gradient(i), gradients[number]) for i, gradients in enumerate(exact)):
                covered[parameter] = known[parameter]
    sizes = {m: sum(use.inputs.numel() + use.gradients.numel() for use in uses[m]) // len(two) for m in modules}
    floats = {p: sum(sizes[m] for m in {m for m, _ in places}) for p, places in covered.items()}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and p not in covered]
    return Plan(covered, floats, loose)


def is_once(opened: Opened, chosen: Plan, parameter: nn.Parameter) -> bool:
    """Whether a covered parameter is used once, by a layer that sees one position a sample."""
    two = np.unique([0, opened.samples - 1])
    (found,) = capture(opened, two, chosen, [parameter])
    return len(found.uses) == 1 and found.uses[0][0].inputs.ndim == 2


def capture(opened: Opened, samples: np.ndarray, chosen: Plan, parameters: list[nn.Parameter]) -> Iterator[Captured]:
    """Gradients of these parameters for a batch, all of whose activations are held until the last is taken."""
    modules = list(dict.fromkeys(module for p in parameters for module, _ in chosen.covered[p]))
    uses = _captured_uses(opened, samples, modules)
    for parameter in parameters:
        yield _collect(parameter, chosen.covered[parameter], uses)


def gather(
    opened: Opened, samples: np.ndarray, chosen: Plan, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor, list[Captured]]:
    """Gradients of these parameters for many samples: those of small ones side by side, (M, D), and the others'."""
    small = [p for p in parameters if chosen.is_small(p)]
    rows = opened.flat.vector.new_empty(len(samples), sum(p.numel() for p in small))
    weights: list[Captured] = []
    size = opened.inference_batch()
    for start in range(0, len(samples), size):
        batch = slice(start, start + size)
        left = number = 0
        for parameter in capture(opened, samples[batch], chosen, parameters):
            if chosen.is_small(parameter.parameter):
                right = left + parameter.parameter.numel()
                rows[batch, left:right] = parameter.gradients()
                left = right
            else:
                if not start:
                    weights.append(parameter.room(len(samples)))
                weights[number].put(batch, parameter)
                number += 1
        del parameter  # with its batch's activations, before those of the next are made
    return rows, weights


def _collect(
    parameter: nn.Parameter, places: list[tuple[nn.Module, str]], uses: dict[nn.Module, list[Use]]
) -> Captured:
    found = [
        (use.turned() if is_transposed(module) and name == "weight" else use, name)
        for module, name in places
        for use in uses[module]
    ]
    return Captured(parameter, found, _kind(*places[0]) == "weight")


def _captured_uses(opened: Opened, samples: np.ndarray, modules: list[nn.Module]) -> dict[nn.Module, list[Use]]:
    """Every entry of these layers for a batch."""
    seen: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor, GradientEdge]]] = {module: [] for module in modules}

    def keep(module: nn.Module, inputs: tuple, named: dict[str, torch.Tensor], output: torch.Tensor) -> None:
        if output.requires_grad:  # nothing comes back through a layer that is entered without gradients
            # The edge is taken now: an in-place ReLU that follows would shift the gradient past itself.
            entering = inputs[0] if inputs else next(iter(named.values()))
            seen[module].append((entering.detach(), output, get_gradient_edge(output)))

    handles = [module.register_forward_hook(keep, prepend=True, with_kwargs=True) for module in modules]
    try:
        losses = opened.batch_losses(opened.batches.take(samples))
    finally:
        for handle in handles:
            handle.remove()
    edges = [edge for entries in seen.values() for *_, edge in entries]
    known = edges and losses.requires_grad
    gradients = iter(torch.autograd.grad(losses.sum(), edges, allow_unused=True) if known else [None] * len(edges))
    return {
        module: [Use(module, a, torch.zeros_like(o) if (d := next(gradients)) is None else d) for a, o, _ in entries]
        for module, entries in seen.items()
    }


def _kind(module: nn.Module, name: str) -> str | None:
    """ "weight" where a sample's gradient is a sum of outer products, "rows" where it is small; None for others.

    Exact types only: a subclass may do anything in its forward.
    """
    if name not in ("weight", "bias"):  # a parameter from which the layer's own is made
        return None
    if type(module) is nn.Linear or is_transposed(module):
        return "weight" if name == "weight" else "rows"
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return None if not plain else "weight" if name == "weight" else "rows"
    if type(module) is nn.Embedding:
        plain = module.padding_idx is None and module.max_norm is None and not module.scale_grad_by_freq
        return "weight" if plain else None
    if type(module) in NORMS:
        batch_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        return None if batch_norm and (module.training or module.running_mean is None) else "rows"
    return None


def _separate(uses: list[Use], samples: int) -> bool:
    """Whether a layer was entered, each time with the samples along the first axis."""
    return bool(uses) and all(len(use.inputs) == len(use.gradients) == samples for use in uses)


def _agree(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return float((found - exact).norm()) <= AGREES * float(exact.norm()) + 1e-12
