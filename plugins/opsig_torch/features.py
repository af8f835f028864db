"""What samples look like to a network: the input of its last linear layer. S samples, D features, G sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from opsig_torch.session import TorchSession


def mean_features(session: TorchSession, sets: list[np.ndarray]) -> np.ndarray | None:
    """Mean over each set of its samples' features, less the mean of all samples and of length one, (G, D) float64.

    The product of two rows is the mean cosine of the sets' centred features. Features are the task's own, else what
    enters the last linear layer; None where a task has neither, or a layer that sees several positions a sample.
    """
    with torch.inference_mode():
        total, count = 0.0, 0
        for _, batch in session.batches.in_pieces(session.inference_batch()):
            found = _features(session, batch)
            if found is None:
                return None
            total, count = total + found.double().sum(0), count + len(found)
        centre = total / count
        means = []
        for members in sets:
            rows = [_features(session, session.batches.take(part)) for part in _parts(session, members)]
            centred = torch.cat([row for row in rows if row is not None]).double() - centre
            means.append((centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300)).mean(0))
        return torch.stack(means).cpu().numpy()


def _parts(session: TorchSession, members: np.ndarray) -> list[np.ndarray]:
    size = session.inference_batch()
    return [members[start : start + size] for start in range(0, len(members), size)]


def _features(session: TorchSession, batch: Any) -> torch.Tensor | None:
    """Features of a batch, (B, D), or None."""
    own = getattr(session.task, "features", None)
    if own is not None:
        return own(session.flat.model, batch)
    entered: list[torch.Tensor] = []
    layers = [module for module in session.flat.model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])) for layer in layers]
    try:
        losses = session.task.losses(session.flat.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return entered[-1] if entered and entered[-1].ndim == 2 and len(entered[-1]) == len(losses) else None
