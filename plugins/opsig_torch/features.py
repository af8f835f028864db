"""What samples look like to a network: the input of its last linear layer. M of S samples, D features, G sets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from opsig_cli.errors import OpsigError
from opsig_torch.opened import Opened

WANTED = "It must return a tensor with a row of numbers for each sample, (B, D)"
HELD_BYTES = 256 << 20
"""Bound on the features that are held to spare a pass."""


def features(opened: Opened, samples: np.ndarray) -> np.ndarray | None:
    """Features of chosen samples, less the mean of all samples and of length one, (M, D) float32.

    The product of two rows is the cosine of centred features. Features are the task's own, else what enters the last
    linear layer; None where a task has neither, or a layer that sees several positions a sample. One forward pass over
    all samples. Samples without a target have no part in the mean.
    """
    found = _centred(opened, samples)
    return None if found is None else found[0].cpu().numpy()


def mean_feature_cosines(opened: Opened, samples: np.ndarray, sets: list[np.ndarray]) -> np.ndarray | None:
    """Mean cosine of each sample's centred features with those of each set of samples, (M, G) float64, or None.

    One forward pass over all samples where their features fit HELD_BYTES; elsewhere two, and only the sets' are held.
    """
    members = np.unique(np.concatenate(sets))
    wanted = np.union1d(members, samples)
    held = _fits(opened, len(wanted))
    found = _centred(opened, wanted if held else members)
    if found is None:
        return None
    rows, centre = found
    place = np.searchsorted(wanted if held else members, np.arange(opened.samples))
    means_GD = torch.stack([rows[place[chosen]].double().mean(0) for chosen in sets])
    if held:
        pieces = [rows[place[part]].double() @ means_GD.T for part in np.array_split(samples, 1 + len(samples) // 4096)]
        return torch.cat(pieces).cpu().numpy()
    everybody = np.full((opened.samples, len(sets)), np.nan)
    for indices, rows in _everybody(opened):
        everybody[indices] = (_unit(rows.double() - centre) @ means_GD.T).cpu().numpy()
    return everybody[samples]


def _fits(opened: Opened, count: int) -> bool:
    """Whether the features of so many samples fit HELD_BYTES."""
    with torch.no_grad():
        found = _features(opened, opened.batches.take(range(min(2, opened.items))))
    return found is not None and found.shape[1] * found.element_size() * count <= HELD_BYTES


def _centred(opened: Opened, samples: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Centred features of length one of the samples, (M, D) float32, and the mean of all samples, (D,) float64."""
    place = np.full(opened.samples, -1)
    place[samples] = np.arange(len(samples))
    kept, total, count, targets = None, None, 0, opened.counts_S
    for indices, found in _everybody(opened):
        if kept is None or total is None:
            kept, total = found.new_empty(len(samples), found.shape[1]), found.new_zeros(found.shape[1]).double()
        here = place[indices]
        kept[torch.from_numpy(here[here >= 0])] = found[np.flatnonzero(here >= 0)]
        finite = found.isfinite().all(1)  # one sample that is not must not move the centre of the others
        if targets is not None:
            finite &= targets[indices]
        total += torch.where(finite[:, None], found.double(), 0).sum(0)
        count += int(finite.sum())
    if kept is None or total is None:
        return None
    centre = total / max(1, count)
    return _unit(kept - centre.to(kept)), centre


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _everybody(opened: Opened) -> Iterator[tuple[slice, torch.Tensor]]:
    """Features of all samples, piece by piece, each in the company that it was trained in; nothing without features."""
    with torch.no_grad():
        for indices, batch in opened.batches.in_pieces(opened.inference_batch()):
            found = _features(opened, batch)
            if found is None:
                return
            if len(found) != indices.stop - indices.start:
                count = indices.stop - indices.start
                raise OpsigError(f"the task's features() returned {len(found)} rows for {count} samples. {WANTED}")
            yield indices, found


def _features(opened: Opened, batch: Any) -> torch.Tensor | None:
    """Features of a batch, (B, D), or None."""
    own = getattr(opened.task, "features", None)
    if own is not None:
        with opened.running.as_trained():
            return _checked(own(opened.flat.model, batch))
    entered: list[torch.Tensor] = []
    layers = [module for module in opened.flat.model.modules() if isinstance(module, nn.Linear)]
    handles = [
        layer.register_forward_pre_hook(
            lambda _, inputs, named: entered.append(inputs[0] if inputs else next(iter(named.values()))),
            with_kwargs=True,
        )
        for layer in layers
    ]
    try:
        losses, _ = opened.forward(batch, predicted=False)
    finally:
        for handle in handles:
            handle.remove()
    if not entered:
        return None
    last = entered[-1]
    if opened.positions > 1 and last.ndim == 3 and last.shape[1] == opened.positions:
        last = last.flatten(0, 1)
    return _real(last) if last.ndim == 2 and len(last) == len(losses) else None


def _checked(features: object) -> torch.Tensor:
    """A task's own features. Raises OpsigError where they are no rows of numbers."""
    if not isinstance(features, torch.Tensor):
        raise OpsigError(f"the task's features() returned {type(features).__name__}. {WANTED}")
    if features.ndim != 2:
        raise OpsigError(f"the task's features() returned shape {tuple(features.shape)}. {WANTED}")
    return _real(features)


def _real(features: torch.Tensor) -> torch.Tensor:
    """The features in a dtype that numpy has, too: under autocast they are in bfloat16."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
