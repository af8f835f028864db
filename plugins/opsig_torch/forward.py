"""Losses and predictions of one batch from one forward pass, and the row of all that batches make up. S samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.tasks import Task


def forward(
    task: Task, model: nn.Module, batch: Any, predicted: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses (B,) and predictions (B,) or None of one batch; the task's losses() and predictions() share the pass."""
    predict = getattr(task, "predictions", None) if predicted else None
    if predict is None:
        return task.losses(model, batch), None
    replay = _Replay(model)
    losses = task.losses(replay, batch)
    with torch.no_grad():
        return losses, predict(replay, batch)


def smoothed(
    task: Task, model: nn.Module, batch: Any, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses (B,) over smoothed labels, the task's own losses (B,), and predictions, from one forward pass.

    Raises UsageError for a task that cannot smooth its labels.
    """
    smooth = getattr(task, "smoothed_losses", None)
    if smooth is None:
        raise UsageError("the task's labels cannot be smoothed: it has no smoothed_losses(model, batch, smoothing)")
    replay, predict = _Replay(model), getattr(task, "predictions", None)
    try:
        minimised = smooth(replay, batch, smoothing)
    except ValueError as error:
        raise UsageError(f"label smoothing of {smoothing:g}: {error}") from error
    with torch.no_grad():
        return minimised, task.losses(replay, batch), None if predict is None else predict(replay, batch)


class LossRow:
    """Losses and predictions of one step, gathered batch by batch on the device they are made on."""

    def __init__(self, samples: int):
        self._samples = samples
        self._losses: torch.Tensor | None = None
        self._predictions: torch.Tensor | None = None

    def put(self, indices: slice | np.ndarray, losses: torch.Tensor, predictions: torch.Tensor | None) -> None:
        """Keep one batch's (B,) losses and predictions. Raises OpsigError where there is not one loss a sample."""
        count = indices.stop - indices.start if isinstance(indices, slice) else len(indices)
        if losses.shape != (count,):
            raise OpsigError(
                f"the task's losses() returned shape {tuple(losses.shape)} for {count} samples. "
                "It must return one unreduced loss a sample"
            )
        losses = losses.detach()
        if self._losses is None:
            self._losses = losses.new_full((self._samples,), torch.nan, dtype=torch.float64)
        self._losses[indices] = losses.double()
        if predictions is None:
            return
        _require_predictions(predictions, losses)
        if self._predictions is None:
            self._predictions = predictions.new_full((self._samples,), -1, dtype=torch.int32)
        self._predictions[indices] = predictions.to(torch.int32)

    def mean(self, targets: torch.Tensor | None = None) -> float:
        """Mean loss, of the samples that have one where that is not all of them, summed in float64."""
        assert self._losses is not None
        return (self._losses if targets is None else self._losses[targets]).mean().item()

    def raw(self, indices: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Losses of some samples as they were put in, (B,) float64, and predictions (B,) or None."""
        if self._losses is None:
            return np.empty(0), None
        predictions = None if self._predictions is None else self._predictions[indices].cpu().numpy()
        return self._losses[indices].cpu().numpy(), predictions

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Losses (S,) float32 and predictions (S,) int32 or None."""
        assert self._losses is not None
        predictions = None if self._predictions is None else self._predictions.cpu().numpy().copy()
        return self._losses.float().cpu().numpy(), predictions


def _require_predictions(predictions: object, losses: torch.Tensor) -> None:
    """Raise OpsigError where there is not one whole number a sample; of probabilities all would be class 0."""
    wanted = "It must return a tensor of integers, one a sample"
    if not isinstance(predictions, torch.Tensor):
        raise OpsigError(f"the task's predictions() returned {type(predictions).__name__}. {wanted}")
    if predictions.shape != losses.shape:
        raise OpsigError(
            f"the task's predictions() returned shape {tuple(predictions.shape)} for {len(losses)} samples. {wanted}"
        )
    if predictions.is_floating_point() and not torch.equal(predictions.nan_to_num(), predictions.nan_to_num().round()):
        raise OpsigError(f"the task's predictions() are not whole numbers. {wanted}")


class _Replay(nn.Module):
    """A model that returns the output it gave before when it is called with the very same input again.

    A task's losses() and predictions() each call the model; this makes them share one forward pass.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model
        self._seen: list[tuple[tuple, dict, Any]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        for old_args, old_kwargs, output in self._seen:
            if _identical(args, old_args) and _identical(kwargs.items(), old_kwargs.items()):
                return output
        output = self.inner(*args, **kwargs)
        self._seen.append((args, kwargs, output))
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def _identical(left: Any, right: Any) -> bool:
    left, right = list(left), list(right)
    return len(left) == len(right) and all(
        (a[0] == b[0] and a[1] is b[1]) if isinstance(a, tuple) else a is b for a, b in zip(left, right, strict=True)
    )
