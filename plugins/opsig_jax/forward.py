"""Losses, predictions and features of samples, by forward passes alone. S samples, D features, N pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from opsig_jax.opened import Opened


def measured(
    opened: Opened, vector: jax.Array, chosen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Losses (S,) float32 and predictions (S,) int32 or None of all samples; of chosen ones, NaN and -1 elsewhere."""

    def make() -> Callable[..., Any]:
        def measure(vector: Any, batch: Any) -> Any:
            parts = opened.tree.split(vector)
            return opened.losses_at(parts, batch), opened.predictions_at(parts, batch)

        return measure

    row = Row(opened.samples)
    for samples, batch in opened.batches if chosen is None else _pieces(opened, chosen):
        row.put(samples, *opened.compiled("losses", make)(vector, batch))
    return row.arrays()


class Row:
    """Losses and predictions of one step, gathered batch by batch."""

    def __init__(self, samples: int):
        self._losses = np.full(samples, np.nan, np.float32)
        self._predictions: np.ndarray | None = None

    def put(self, samples: slice | np.ndarray, losses: Any, predictions: Any) -> None:
        """Keep one batch's (B,) losses, and predictions where there are any."""
        self._losses[samples] = losses
        if predictions is not None:
            if self._predictions is None:
                self._predictions = np.full(len(self._losses), -1, np.int32)
            self._predictions[samples] = predictions

    def only(self, samples: np.ndarray) -> None:
        """Forget all but these samples."""
        others = np.setdiff1d(np.arange(len(self._losses)), samples)
        self._losses[others] = np.nan
        if self._predictions is not None:
            self._predictions[others] = -1

    def arrays(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Losses (S,) float32 and predictions (S,) int32 or None."""
        return self._losses, self._predictions


def _pieces(opened: Opened, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, Any]]:
    size = opened.batches.batch_size
    for first in range(0, len(chosen), size):
        some = chosen[first : first + size]
        yield some, opened.batches.take(some)


def centred_features(opened: Opened, vector: jax.Array) -> np.ndarray | None:
    """The task's own features of all samples, less their mean and of length one, (S, D) float64; None without.

    A sample whose features are not finite has no part in the mean.
    """
    rows = _features(opened, vector)
    if rows is None:
        return None
    finite = np.isfinite(rows).all(1)
    rows = rows - rows[finite].mean(0)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)


def outputs(
    opened: Opened, vector: jax.Array, pictures: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, float | None]:
    """Logits (N, classes) float64 and feature norms (N,) of pictures (N, H, W, C), and the data's mean norm."""
    rows = _features(opened, vector)
    with opened.computing():
        batch = (opened.task.inputs(pictures), None)
        parts = opened.tree.split(vector)
        params = opened.tree.build(parts)
        logits = np.asarray(opened.task.logits(params, batch), np.float64)
        own = None if rows is None else np.asarray(opened.task.features(params, batch), np.float64)
    if rows is None or own is None:
        return logits, None, None
    return logits, np.linalg.norm(own, axis=1), float(np.linalg.norm(rows, axis=1).mean())


def _features(opened: Opened, vector: jax.Array) -> np.ndarray | None:
    """Features of all samples as the task has them, (S, D) float64, or None."""
    if getattr(opened.task, "features", None) is None:
        return None

    def make() -> Callable[..., Any]:
        return lambda vector, batch: opened.task.features(opened.tree.build(opened.tree.split(vector)), batch)

    of_batch = opened.compiled("features", make)
    return np.concatenate([np.asarray(of_batch(vector, batch), np.float64) for _, batch in opened.batches])
