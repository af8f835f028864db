"""A task whose items have several samples each, as one whose samples are counted through: sample = item x T + position.

B items of a batch, T positions of an item, D features. What the task returns by item and position is laid end to end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from opsig_cli.errors import OpsigError
from opsig_cli.tasks import Task, positions_of


def by_sample(task: Task) -> Any:
    """The task with losses (B T,), predictions (B T,) and features (B T, D); itself where an item is a sample."""
    return _Flattened(task) if positions_of(task) > 1 and not isinstance(task, _Flattened) else task


class _Flattened:
    """Passes everything on to the task, and flattens what it returns of a batch.

    An optional member is there where the task has it.
    """

    def __init__(self, task: Any):
        self._task = task
        self._positions = positions_of(task)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._task, name)
        if name not in ("predictions", "features", "smoothed_losses"):
            return found
        return lambda model, batch, *more: self._flat(found(model, batch, *more), name)

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The loss of every position of every item, (B T,), NaN where there is no target."""
        return self._flat(self._task.losses(model, batch), "losses")

    def _flat(self, found: torch.Tensor, name: str) -> torch.Tensor:
        axes = 3 if name == "features" else 2
        if found.ndim != axes or found.shape[1] != self._positions:
            wanted = f"(items, {self._positions}{', features' if axes == 3 else ''})"
            raise OpsigError(
                f"the task's {name}() returned shape {tuple(found.shape)}, and {wanted} is what a task with "
                f"{self._positions} positions an item returns"
            )
        return found.flatten(0, 1)


def one_of(losses: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The loss at a position, itself a tensor, of an item's losses (T,), also within torch's transformations."""
    here = torch.arange(len(losses), device=losses.device) == position
    return torch.where(here, losses, torch.zeros_like(losses)).sum()
