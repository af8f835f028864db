"""Samples that share an item: the order in which they go through the network, and their gradients at its layers.

M samples, T positions of a layer. All samples of an item have one forward pass; each has a backward pass of its own, in
which one sample of every item takes part.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from opsig_torch.layer_gradients import Use
from opsig_torch.opened import Opened
from opsig_torch.ways import Disagrees


def grouped(opened: Opened, samples: np.ndarray) -> np.ndarray:
    """An order of chosen samples, (M,), in which a piece has few items, and these equally many samples.

    A backward pass serves one sample of each item of a piece: first the first of every item, then the second.
    """
    if opened.positions == 1:
        return np.arange(len(samples))
    _, number, counts = np.unique(samples // opened.positions, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.lexsort((rank[number], _turns(number), rank[number] // opened.inference_batch()))


def _turns(number: np.ndarray) -> np.ndarray:
    """How many samples of the same item come before each, (M,)."""
    order = np.argsort(number, kind="stable")
    turns = np.empty(len(number), int)
    turns[order] = np.arange(len(number)) - np.searchsorted(number[order], number[order])
    return turns


def uses_by_position(
    losses: torch.Tensor, edges: list[GradientEdge], entries: list[tuple], places: np.ndarray, items: np.ndarray,
    count: int, single: frozenset[nn.Module],
) -> list[Use]:  # fmt: skip
    """The entries with a row for each sample, at these places of the losses and of these items, (M,), of `count`.

    A backward pass has one sample of every item at a time; items are kept apart, so that each has its own row of it.
    """
    turns = _turns(items)
    order = np.argsort(turns, kind="stable")
    ends = np.searchsorted(turns[order], np.arange(turns.max() + 2))
    found: list[Use] = []
    for first, last in pairwise(ends) if edges else ():
        here = order[first:last]
        chosen = torch.zeros_like(losses)
        chosen[torch.from_numpy(places[here]).to(losses.device)] = 1
        rows = torch.from_numpy(items[here]).to(losses.device)
        everybody = len(here) == count and bool((items[here] == np.arange(count)).all())
        gradients = [None] * len(edges)
        if losses.requires_grad:
            gradients = torch.autograd.grad(losses, edges, chosen, retain_graph=True, allow_unused=True)
        for number, ((module, a, o, _), d) in enumerate(zip(entries, gradients, strict=True)):
            part = Use(module, a, torch.zeros_like(o) if d is None else d)
            if not len(a) == len(o) == count:  # not by item: `_separate` will tell
                found += [part] if not first else []
                continue
            if module in single:
                part = at_its_position(part)
            if not everybody:
                part = Use(module, part.inputs[rows], part.gradients[rows])
            if not first:
                found.append(part if last == len(items) else part.empty(len(items)))
            if last - first < len(items):
                found[number].put(slice(first, last), part)
    if (order != np.arange(len(order))).any():
        back = torch.from_numpy(np.argsort(order, kind="stable")).to(losses.device)
        found = [Use(u.module, u.inputs[back], u.gradients[back]) if len(u.inputs) == len(back) else u for u in found]
    return found


def sees_one(use: Use) -> bool:
    """Whether every sample's gradient is that of one position of a layer that was entered by position."""
    shaped = use.gradients.ndim == 3 and use.inputs.shape[:2] == use.gradients.shape[:2]
    return shaped and use.gradients.shape[1] > 1 and bool((_live(use).sum(1) <= 1).all())


def _live(use: Use) -> torch.Tensor:
    """Positions at which a sample has a gradient, (M, T)."""
    return (use.gradients != 0).any(2)


def at_its_position(use: Use) -> Use:
    """The use with the one position that has a gradient, (M, 1, ...). Raises Disagrees where there are several."""
    live = _live(use)
    if bool((live.sum(1) > 1).any()):
        raise Disagrees("a sample's loss sees several positions of a layer of which it saw one")
    rows, place = torch.arange(len(live), device=live.device), live.int().argmax(1)
    return Use(use.module, use.inputs[rows, place, None], use.gradients[rows, place, None])
