"""Which parameters' per-sample gradients are had from layers' inputs and outputs, and passes that capture these.

M samples, P parameters, T positions of a layer. One backward pass to the layers' outputs is all that is taken from
autograd; where items have several samples, one for each of an item's chosen samples, from a forward pass that they
share. `plan` finds the parameters for which `opsig_torch.layer_gradients` holds, and holds each against autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from opsig_torch import layer_gradients, plain
from opsig_torch.eigen import random_start
from opsig_torch.held_statistics import frozen_statistics
from opsig_torch.item_passes import at_its_position, sees_one, uses_by_position
from opsig_torch.layer_gradients import NORMS, Captured, Use, is_transposed
from opsig_torch.opened import Opened

AGREES = 1e-3
"""Relative error up to which a captured gradient is the one of autograd."""
SAMPLES_SHARE, BLOCK_SHARE = 0.25, 0.0625
"""Parts of the memory to spare that what is held of all samples, and a block of gradients, may take."""
SHAKEN = 0.01
"""Size of the noise that is added to parameters while this is found out, relative to theirs."""


@dataclass(frozen=True)
class Plan:
    """`covered`: parameters with captured gradients, each with the (module, name)s that use it and what one sample's
    activations take in floats. `loose`: names of all other parameters, whose gradients are had by vmap, or, where that
    does not hold, one sample after the other. `single`: modules of which a sample's loss sees one position alone, as it
    does of a language model's last layer."""

    covered: dict[nn.Parameter, list[tuple[nn.Module, str]]]
    floats: dict[nn.Parameter, int]
    loose: list[str]
    vmapped: bool = True
    single: frozenset[nn.Module] = frozenset()

    def groups(self, samples: int, most: int = layer_gradients.MEMORY_BYTES) -> list[list[nn.Parameter]]:
        """Consecutive parameters of which what is held of so many samples fits so many bytes."""
        groups: list[list[nn.Parameter]] = []
        room = 0
        for parameter, floats in self.floats.items():
            need = min(floats, parameter.numel()) * samples * 4
            if not groups or need > room:
                groups.append([])
                room = most
            groups[-1].append(parameter)
            room -= need
        return groups

    def held(self, samples: int) -> tuple[int, int]:
        """Bytes that are held of so many samples: of the parameter that takes most, and of all."""
        floats = [min(floats, parameter.numel()) for parameter, floats in self.floats.items()]
        return 4 * samples * max(floats, default=0), 4 * samples * sum(floats)

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
    two = _two(opened)
    modules = list(dict.fromkeys(module for places in known.values() for module, _ in places))
    uses = _captured_uses(opened, two, modules)
    single = frozenset(m for m in modules if opened.positions > 1 and uses[m] and all(map(sees_one, uses[m])))
    uses |= {module: [at_its_position(use) for use in uses[module]] for module in single}
    known = {p: places for p, places in known.items() if all(_separate(uses[m], len(two)) for m, _ in places)}
    losses = opened.losses_of(two)
    parameters = opened.flat.parameters
    exact = [plain.gradients(opened, loss, keep=True) for loss in losses]
    covered = {}
    for number, parameter in enumerate(parameters):
        if parameter in known:
            found = _collect(parameter, known[parameter], uses, room_of(opened))
            if _is_exact(found, [gradients[number] for gradients in exact]):
                covered[parameter] = known[parameter]
    sizes = {m: sum(use.inputs.numel() + use.gradients.numel() for use in uses[m]) // len(two) for m in modules}
    floats = {p: sum(sizes[m] for m in {m for m, _ in places}) for p, places in covered.items()}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and p not in covered]
    return Plan(covered, floats, loose, single=single)


def _two(opened: Opened) -> np.ndarray:
    """The first and the last sample; of items that have several, the last with a target of each and one in the middle.

    What comes early in a sequence sees little, and would let a layer pass for one that sees a single position.
    """
    if opened.positions == 1:
        return np.unique([0, opened.samples - 1])
    found = []
    for item in (0, opened.items - 1):
        samples = item * opened.positions + np.arange(opened.positions)
        with torch.no_grad():
            counted = samples[opened.losses_of(samples).isfinite().cpu().numpy()]
        found += [counted[len(counted) // 2], counted[-1]] if len(counted) else [samples[-1]]
    return np.unique(found)


def is_once(opened: Opened, chosen: Plan, parameter: nn.Parameter) -> bool:
    """Whether a covered parameter is used once, by a layer that sees one position a sample."""
    two = np.unique([0, opened.samples - 1])
    (found,) = capture(opened, two, chosen, [parameter])
    return len(found.uses) == 1 and found.uses[0][0].inputs.ndim == 2


def capture(opened: Opened, samples: np.ndarray, chosen: Plan, parameters: list[nn.Parameter]) -> Iterator[Captured]:
    """Gradients of these parameters for a batch, all of whose activations are held until the last is taken."""
    modules = list(dict.fromkeys(module for p in parameters for module, _ in chosen.covered[p]))
    uses = _captured_uses(opened, samples, modules, chosen.single)
    for parameter in parameters:
        yield _collect(parameter, chosen.covered[parameter], uses, room_of(opened))


def gather(
    opened: Opened, samples: np.ndarray, chosen: Plan, parameters: list[nn.Parameter]
) -> tuple[torch.Tensor, list[Captured]]:
    """Gradients of these parameters for many samples: those of small ones side by side, (M, D), and the others'."""
    small = [p for p in parameters if chosen.is_small(p)]
    rows = opened.flat.vector.new_empty(len(samples), sum(p.numel() for p in small))
    weights: list[Captured] = []
    for start, part in pieces(opened, samples, chosen):
        batch = slice(start, start + len(part))
        left = number = 0
        for parameter in capture(opened, part, chosen, parameters):
            if chosen.is_small(parameter.parameter):
                right = left + parameter.parameter.numel()
                rows[batch, left:right] = parameter.gradients()
                left = right
            else:
                if not start:
                    weights.append(parameter.empty(len(samples)))
                weights[number].put(batch, parameter)
                number += 1
        del parameter  # with its batch's activations, before those of the next are made
    return rows, weights


def room_of(opened: Opened) -> layer_gradients.Room:
    """What may be held of all samples at a time, and of a block."""
    return layer_gradients.Room(
        opened.share(SAMPLES_SHARE, layer_gradients.MEMORY_BYTES),
        opened.share(BLOCK_SHARE, layer_gradients.BLOCK_BYTES),
    )


def _collect(
    parameter: nn.Parameter, places: list[tuple[nn.Module, str]], uses: dict[nn.Module, list[Use]],
    room: layer_gradients.Room,
) -> Captured:  # fmt: skip
    is_weight = _kind(*places[0]) == "weight"
    found = [(use, name) for module, name in places for use in uses[module]]
    if is_weight:
        found = [(use.transposed() if is_transposed(use.module) else use, name) for use, name in found]
    return Captured(parameter, found, is_weight, room)


def pieces(opened: Opened, samples: np.ndarray, plan: Plan | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Chosen samples, in their order, in pieces whose items go through the network at a time; each with its start.

    `plan`: all of whose layers' activations are then held, so that a piece has no more samples than memory allows for.
    """
    size = opened.inference_batch()
    if opened.positions == 1:
        for start in range(0, len(samples), size):
            yield start, samples[start : start + size]
        return
    held = sum(plan.floats.values()) if plan is not None else 0
    most = max(1, room_of(opened).samples // (8 * held)) if held else len(samples)
    items = samples // opened.positions
    start = 0
    while start < len(samples):
        _, first = np.unique(items[start : start + most], return_index=True)
        first = np.sort(first)
        stop = start + int(first[size]) if len(first) > size else min(start + most, len(samples))
        yield start, samples[start:stop]
        start = stop


def _captured_uses(
    opened: Opened, samples: np.ndarray, modules: list[nn.Module], single: frozenset[nn.Module] = frozenset()
) -> dict[nn.Module, list[Use]]:  # fmt: skip
    """Every entry of these layers for a batch. Raises Disagrees where one of the `single` ones sees more positions."""
    seen: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor, GradientEdge]]] = {module: [] for module in modules}
    others: set[nn.Module] = set()  # not one tensor to one tensor

    def keep(module: nn.Module, inputs: tuple, named: dict[str, torch.Tensor], output: torch.Tensor) -> None:
        if len(inputs) + len(named) != 1 or not isinstance(output, torch.Tensor) or is_functorch_wrapped_tensor(output):
            others.add(module)
        elif output.requires_grad:  # nothing comes back through a layer that is entered without gradients
            # The edge is taken now: an in-place ReLU that follows would shift the gradient past itself.
            entering = inputs[0] if inputs else next(iter(named.values()))
            seen[module].append((entering.detach(), output, get_gradient_edge(output)))

    items, places = opened.placed(samples)
    handles = [module.register_forward_hook(keep, prepend=True, with_kwargs=True) for module in modules]
    try:
        losses = opened.batch_losses(opened.batches.take(items))
    finally:
        for handle in handles:
            handle.remove()
    entries = [(module, a, o, edge) for module, several in seen.items() for a, o, edge in several]
    edges = [edge for *_, edge in entries]
    if opened.positions == 1:
        known = edges and losses.requires_grad
        gradients = torch.autograd.grad(losses.sum(), edges, allow_unused=True) if known else [None] * len(edges)
        made = [
            Use(module, a, torch.zeros_like(o) if d is None else d)
            for (module, a, o, _), d in zip(entries, gradients, strict=True)
        ]
    else:
        made = uses_by_position(losses, edges, entries, places, places // opened.positions, len(items), single)
    uses: dict[nn.Module, list[Use]] = {module: [] for module in modules}
    for use in made:
        if use.module not in others:
            uses[use.module].append(use)
    return uses


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
        plain = module.max_norm is None and not module.scale_grad_by_freq
        return "weight" if plain else None
    if type(module) in NORMS:
        batch_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        return None if batch_norm and (module.training or module.running_mean is None) else "rows"
    if isinstance(module, torch.jit.ScriptModule):  # cannot be listened to
        return None
    leaf = next(module.children(), None) is None
    return "rows" if leaf and module.get_parameter(name).ndim == 1 else None  # as a norm of a person's own


def _separate(uses: list[Use], samples: int) -> bool:
    """Whether a layer was entered, each time with the samples along the first axis."""
    return bool(uses) and all(
        not use.inputs.is_nested and not use.gradients.is_nested and len(use.inputs) == len(use.gradients) == samples
        for use in uses
    )


def _is_exact(found: Captured, exact: list[torch.Tensor]) -> bool:
    """Whether the gradients are these, those of autograd."""
    try:
        return all(_agree(found.sample_gradient(i), gradient) for i, gradient in enumerate(exact))
    except Exception:  # a layer of a person's own, in a transformation that it was not written for
        return False


def _agree(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return float((found - exact).norm()) <= AGREES * float(exact.norm()) + 1e-12
