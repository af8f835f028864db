"""Training that records as it goes, by optax. S samples, P parameters.

A run is a function of its first state, the seed and the step number alone, so that a resumed run repeats an
uninterrupted one bit for bit on the CPU. What an optimizer remembers is in a file by the names that every backend uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import tree_utils

from opsig_cli.backends import Snapshot, State, Training, minibatch
from opsig_cli.errors import UsageError
from opsig_jax.forward import Row, measured
from opsig_jax.opened import Opened

OPTIMIZERS = ("gd", "sgd", "momentum", "adam")
SLOTS = {"momentum": {"momentum_buffer": "trace"}, "adam": {"exp_avg": "mu", "exp_avg_sq": "nu"}}
"""What a file calls what optax remembers."""


def train(opened: Opened, training: Training, start: State) -> Iterator[Snapshot]:
    """Train from `start` and yield a snapshot of every step up to `training.steps`, both included.

    A full-batch snapshot's losses come from the forward pass that trains; a minibatch run measures them in a pass of
    their own. Raises UsageError where weights are not one a sample, or labels cannot be smoothed.
    """
    if training.weights is not None and training.weights.shape != (opened.samples,):
        raise UsageError(f"{training.weights.size} weights are not one for each of the {opened.samples} samples")
    vector = opened.vector_of(start)
    with opened.computing():
        optimizer = _optimizer(training)
        slots = _restored(opened, optimizer.init(vector), training, start)
    taken = bool(start.optimizer)
    step_once = jax.jit(_update(optimizer, training.clip_norm))
    gradient = _full_batch if training.batch_size is None else _minibatch
    for step in range(start.step, training.steps + 1):
        state = None
        if training.wants_state(step):
            kept = _kept(slots, training) if taken else {}
            state = State(step, np.array(vector), np.empty(0), kept)
        loss, slope, row = gradient(opened, training, vector, step)
        losses = predictions = None
        if training.wants_losses(step):
            if row is not None and training.tracked is not None:
                row.only(training.tracked)
            losses, predictions = measured(opened, vector, training.tracked) if row is None else row.arrays()
        with opened.computing():
            new, after, grad_norm, update_norm = step_once(vector, slots, slope)
        last = step == training.steps
        yield Snapshot(
            step, loss, training.learning_rate, float(grad_norm), float("nan") if last else float(update_norm),
            losses, predictions, state,
        )  # fmt: skip
        vector, slots, taken = new, after, True


def _full_batch(opened: Opened, training: Training, vector: jax.Array, _: int) -> tuple[float, jax.Array, Row]:
    """The loss, its gradient (P,), batch by batch, and every sample's loss on the way."""
    row, total, slope = Row(opened.samples), 0.0, None
    for samples, batch in opened.batches:
        part, counted, *measured_here = _gradient(opened, training, vector, batch, samples, opened.samples)
        with opened.computing():
            slope = part if slope is None else slope + part
        row.put(samples, *measured_here)
        total += float(np.asarray(counted).sum(dtype=np.float64))
    assert slope is not None
    return total / opened.samples, slope, row


def _minibatch(opened: Opened, training: Training, vector: jax.Array, step: int) -> tuple[float, jax.Array, None]:
    assert training.batch_size is not None
    chosen = minibatch(opened.samples, training.batch_size, training.seed, step)
    batch = opened.batches.take(chosen)
    slope, counted, _, _ = _gradient(opened, training, vector, batch, chosen, len(chosen))
    return float(np.asarray(counted).mean(dtype=np.float64)), slope, None


def _gradient(
    opened: Opened, training: Training, vector: jax.Array, batch: Any, samples: slice | np.ndarray, count: int
) -> tuple[jax.Array, Any, Any, Any]:
    """Gradient (P,) of the weighted losses' sum over `count`, these (B,), the task's own losses, and predictions."""
    smoothing = training.label_smoothing

    def make() -> Callable[..., Any]:
        def objective(parts: Any, batch: Any, weights: Any, count: Any) -> Any:
            losses = opened.losses_at(parts, batch)
            counted = losses if smoothing is None else opened.smoothed_at(parts, batch, smoothing)
            counted = counted * weights
            return counted.sum() / count, (counted, losses, opened.predictions_at(parts, batch))

        def gradient(vector: Any, *given: Any) -> Any:
            parts, found = jax.grad(objective, has_aux=True)(opened.tree.split(vector), *given)
            return opened.tree.joined(parts), *found

        return gradient

    weights = np.ones(opened.samples) if training.weights is None else training.weights
    given = opened.put(weights[samples]), opened.put(np.asarray(count))
    return opened.compiled(f"training gradient {smoothing}", make)(vector, batch, *given)


def _update(optimizer: optax.GradientTransformation, clip_norm: float | None) -> Callable[..., Any]:
    """One step: parameters and what is remembered afterwards, the gradient's norm before clipping, the step's."""

    def update(vector: jax.Array, slots: Any, slope: jax.Array) -> Any:
        norm = jnp.linalg.norm(slope)
        if clip_norm is not None:
            slope = jnp.where(norm > clip_norm, slope * (clip_norm / norm), slope)
        change, slots = optimizer.update(slope, slots, vector)
        new = cast(jax.Array, optax.apply_updates(vector, change))
        return new, slots, norm, jnp.linalg.norm(new - vector)

    return update


def _optimizer(training: Training) -> optax.GradientTransformation:
    rate = training.learning_rate
    match training.optimizer:
        case "gd" | "sgd":
            chosen = optax.sgd(rate)
        case "momentum":
            chosen = optax.sgd(rate, training.momentum)
        case "adam":
            chosen = optax.adam(rate, *training.betas, eps=training.epsilon)
        case other:
            raise UsageError(f"the jax backend has no optimizer '{other}'. It has: {', '.join(OPTIMIZERS)}")
    return optax.chain(optax.add_decayed_weights(training.weight_decay), chosen) if training.weight_decay else chosen


def _kept(slots: Any, training: Training) -> dict[str, np.ndarray]:
    """What the optimizer remembers, (P,) each, by the file's names."""
    names = SLOTS.get(training.optimizer, {})
    return {name: np.array(tree_utils.tree_get(slots, own)) for name, own in names.items()}


def _restored(opened: Opened, slots: Any, training: Training, start: State) -> Any:
    """What the optimizer remembers at the start; its count is of the steps since it began."""
    names = SLOTS.get(training.optimizer, {})
    if not start.optimizer or not names.keys() <= start.optimizer.keys():
        return slots
    found = {own: opened.put(start.optimizer[name]) for name, own in names.items()}
    if training.optimizer == "adam":
        found["count"] = jnp.asarray(start.step - training.began, jnp.int32)
    return tree_utils.tree_set(slots, **found)
