"""Training that records as it goes. S samples, P parameters.

A run is a function of its first state, the seed and the step number alone (minibatch order and dropout are drawn
from the seed and the step), so that a resumed run repeats an uninterrupted one bit for bit on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from opsig_cli.backends import Snapshot, State, Training, minibatch
from opsig_cli.errors import UsageError
from opsig_torch.forward import LossRow, smoothed
from opsig_torch.opened import Opened
from opsig_torch.plain import require_graph, require_losses
from opsig_torch.splitsgd import SignSGD, SplitSGD
from opsig_torch.updates import Adam, Descent

OPTIMIZERS = ("gd", "sgd", "momentum", "adam", "splitsgd", "signsgd")
Optimizer = Descent | Adam | SplitSGD


Gradient = Callable[[Opened, Training, int, bool], tuple[float, LossRow | None]]
"""Puts the gradient of a step into `flat.gradient`; gives the loss, and the samples' losses where they are wanted."""


def train(opened: Opened, training: Training, start: State, full_batch: Gradient | None = None) -> Iterator[Snapshot]:
    """Train from `start` and yield a snapshot of every step up to `training.steps`, both included.

    A full-batch snapshot's losses come from the forward pass that trains; a minibatch run measures them in a pass of
    their own. `train_loss` and `grad_norm` are those of the minibatch where there is one, and of what is minimised
    where samples have weights or labels are smoothed; of a last step without its gradient it is the mean of the losses
    that were measured. Raises UsageError where weights are not one a sample, or labels cannot be smoothed.
    """
    if training.weights is not None and training.weights.shape != (opened.samples,):
        raise UsageError(f"{training.weights.size} weights are not one for each of the {opened.samples} samples")
    if training.tracked is not None and training.batch_size is not None and opened.couples_samples:
        raise UsageError(
            "with batch norm by chunks a sample's loss depends on its whole chunk. Use --statistics running, or leave "
            "--track-samples out"
        )
    with opened.at(start):
        assert opened.target_count  # found now: later it would cost draws of dropout, and move running statistics
        spared = _without_gradient(opened) if training.weight_decay else []
    optimizer = _optimizer(opened, training, spared)
    opened.load(start)
    _restore(optimizer, opened, start, training.began)
    gradient = (full_batch or _full_batch_gradient) if training.batch_size is None else _minibatch_gradient
    for step in range(start.step, training.steps + 1):
        wants_losses = training.wants_losses(step)
        state = _state(opened, optimizer, step) if training.wants_state(step) else None
        if step == training.steps and wants_losses and training.replayed:
            losses, predictions = _losses_alone(opened, training.tracked).arrays()
            if training.tracked is not None:
                _keep(training.tracked, losses, predictions)
            nothing, measured = float("nan"), losses[~np.isnan(losses)]
            mean = float(measured.mean()) if len(measured) else nothing
            yield Snapshot(step, mean, training.learning_rate, nothing, nothing, losses, predictions, state)
            return
        silent = _silent(opened, training) if gradient is _full_batch_gradient and step == start.step else None
        if silent is not None:
            train_loss, row = _gradient_without(opened, training, start, silent)
        else:
            train_loss, row = gradient(opened, training, step, wants_losses)
        grad_norm = opened.flat.gradient.norm().item()
        if training.clip_norm is not None and grad_norm > training.clip_norm:
            opened.flat.gradient.mul_(training.clip_norm / grad_norm)
        update_norm = float("nan")
        if step < training.steps:
            before = opened.flat.vector.detach().clone()
            optimizer.step()
            update_norm = torch.dist(opened.flat.vector.detach(), before).item()
        losses, predictions = row.arrays() if row is not None and wants_losses else (None, None)
        if losses is not None and training.tracked is not None:
            _keep(training.tracked, losses, predictions)
        signed = optimizer.signed_fraction if isinstance(optimizer, SplitSGD) else float("nan")
        yield Snapshot(
            step, train_loss, training.learning_rate, grad_norm, update_norm, losses, predictions, state, signed
        )  # fmt: skip


def _keep(tracked: np.ndarray, losses: np.ndarray, predictions: np.ndarray | None) -> None:
    """Make what others than the tracked samples have unknown."""
    others = np.ones(len(losses), bool)
    others[tracked] = False
    losses[others] = np.nan
    if predictions is not None:
        predictions[others] = -1


def _full_batch_gradient(opened: Opened, training: Training, step: int, _: bool) -> tuple[float, LossRow]:
    """Gradient of the mean loss into `flat.gradient`, batch by batch, and every sample's loss on the way."""
    opened.measuring_mode()
    opened.flat.gradient.zero_()
    row = LossRow(opened.samples)
    plain, total = training.weights is None and training.label_smoothing is None, 0.0
    for indices, batch in opened.batches:
        counted, losses, predictions = counted_losses(opened, training, indices, batch)
        row.put(indices, losses, predictions)
        counted = opened.counted(counted, indices)
        (require_graph(counted).sum() / opened.target_count).backward()
        if not plain:
            total += counted.detach().double().sum().item()
    return row.mean(opened.counts_S) if plain else total / opened.target_count, row


def _silent(opened: Opened, training: Training) -> np.ndarray | None:
    """The samples of weight 0 of a replay where they are few, all others weigh 1 and each has a gradient of its own;
    else None."""
    if (
        not training.replayed
        or training.weights is None
        or training.label_smoothing is not None
        or opened.couples_samples
    ):
        return None
    silent = np.flatnonzero(training.weights != 1)
    few = 0 < len(silent) <= opened.samples // 2 and opened.positions == 1
    return silent if few and not training.weights[silent].any() else None


def _gradient_without(opened: Opened, training: Training, start: State, silent: np.ndarray) -> tuple[float, LossRow]:
    """As `_full_batch_gradient` of a first step with some samples at weight 0: the gradient of all, which is kept for
    the next training from the same state, less that of these few."""

    def of_all() -> tuple[torch.Tensor, LossRow]:
        _, row = _full_batch_gradient(opened, replace(training, weights=None), start.step, True)
        return opened.flat.gradient.clone(), row

    whole, row = opened.once_at(start, "gradient", of_all)
    opened.measuring_mode()
    opened.flat.gradient.zero_()
    out = 0.0
    for first in range(0, len(silent), opened.batch_size):
        losses, _ = opened.forward(opened.batches.take(silent[first : first + opened.batch_size]), predicted=False)
        counted = opened.counted(losses, silent[first : first + opened.batch_size])
        (-counted.sum() / opened.target_count).backward()
        out += counted.detach().double().sum().item()
    opened.flat.gradient.add_(whole)
    return row.mean(opened.counts_S) - out / opened.target_count, row


def counted_losses(
    opened: Opened, training: Training, indices: slice, batch: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What is minimised of a batch, (B,), the task's own losses (B,), and predictions, from one forward pass."""
    if training.label_smoothing is None:
        losses, predictions = opened.forward(batch, predicted=not training.replayed)
        return _weighted(losses, training, indices), losses, predictions
    with opened.running.as_trained():
        counted, losses, predictions = smoothed(opened.task, opened.flat.model, batch, training.label_smoothing)
    return _weighted(counted, training, indices), losses, predictions


def _weighted(losses: torch.Tensor, training: Training, indices: slice | np.ndarray) -> torch.Tensor:
    """The losses (B,) of these samples times their weights."""
    if training.weights is None:
        return losses
    return losses * torch.from_numpy(training.weights[indices]).to(losses)


def _minibatch_gradient(
    opened: Opened, training: Training, step: int, wants_losses: bool
) -> tuple[float, LossRow | None]:
    assert training.batch_size is not None
    row = _losses_alone(opened, training.tracked) if wants_losses else None
    opened.flat.model.train()
    torch.manual_seed(int(np.random.SeedSequence([training.seed, step]).generate_state(1)[0]))
    opened.flat.gradient.zero_()
    items = minibatch(opened.items, training.batch_size, training.seed, step)
    chosen = opened.samples_of(items)
    batch = opened.batches.take(items)
    with opened.running.as_trained():
        if training.label_smoothing is None:
            losses = opened.task.losses(opened.flat.model, batch)
        else:
            losses = smoothed(opened.task, opened.flat.model, batch, training.label_smoothing)[0]
    weighted = _weighted(require_graph(require_losses(losses, len(chosen))), training, chosen)
    if opened.counts_S is None:
        mean = weighted.mean()
    else:
        mean = opened.counted(weighted, chosen).sum() / opened.counts_S.cpu()[chosen].sum().clamp_min(1)
    mean.backward()
    return mean.item(), row


def _losses_alone(opened: Opened, tracked: np.ndarray | None) -> LossRow:
    """The losses of all samples, or of those that are tracked and the others of their items, without a gradient."""
    row = LossRow(opened.samples)
    opened.measuring_mode()
    buffers = [buffer.clone() for _, buffer in opened.flat.buffers]  # measuring must not move running statistics
    with torch.no_grad():
        for indices, batch in _measured(opened, tracked):
            row.put(indices, *opened.forward(batch))
        for (_, buffer), saved in zip(opened.flat.buffers, buffers, strict=True):
            buffer.copy_(saved)
    return row


def _measured(opened: Opened, tracked: np.ndarray | None) -> Iterator[tuple[slice | np.ndarray, Any]]:
    """The samples whose losses are measured beside a minibatch, in batches, with the others of their items."""
    if tracked is None:
        yield from opened.batches
        return
    items, _ = opened.placed(tracked)
    for start in range(0, len(items), opened.batch_size):
        chosen = items[start : start + opened.batch_size]
        yield opened.samples_of(chosen), opened.batches.take(chosen)


def _without_gradient(opened: Opened) -> list[slice]:
    """Where the parameters lie on which no loss depends: they do not decay, as torch.optim has them."""
    left = dict(enumerate(opened.flat.parameters))
    for _, batch in opened.batches:
        with torch.enable_grad():
            losses = require_graph(opened.batch_losses(batch))
            found = torch.autograd.grad(losses.nansum(), list(left.values()), allow_unused=True)
        left = {number: left[number] for number, part in zip(left, found, strict=True) if part is None}
        if not left:
            break
    places = [tensor for tensor in opened.layout if tensor.kind == "parameter"]
    return [slice(places[n].offset, places[n].offset + places[n].size) for n in left]


def _optimizer(opened: Opened, training: Training, spared: list[slice]) -> Optimizer:
    """`spared`: see `_without_gradient`."""
    vector, rate, decay = opened.flat.vector, training.learning_rate, training.weight_decay
    match training.optimizer:
        case "gd" | "sgd":
            return Descent(vector, rate, weight_decay=decay, spared=spared)
        case "momentum":
            return Descent(vector, rate, training.momentum, decay, spared)
        case "adam":
            return Adam(vector, rate, training.betas, training.epsilon, decay, spared)
        case "splitsgd" | "signsgd" if decay:
            raise UsageError(f"{training.optimizer} has no weight decay. Leave --weight-decay out")
        case "signsgd":
            return SignSGD([vector], rate)
        case "splitsgd":
            return SplitSGD(
                [vector], rate, training.sign_learning_rate, training.momentum, training.dampening, training.radius
            )
    raise UsageError(f"no optimizer is called '{training.optimizer}'. Known: {', '.join(OPTIMIZERS)}")


def _state(opened: Opened, optimizer: Optimizer, step: int) -> State:
    slots = optimizer.state.get(opened.flat.vector, {})
    kept = {name: value.detach().cpu().numpy().copy() for name, value in slots.items()}
    radius = optimizer.param_groups[0]["radius"] if isinstance(optimizer, SplitSGD) else None
    if radius is not None:
        kept["radius"] = np.asarray(radius, np.float64)
    return replace(opened.state(step), optimizer=kept)


def _restore(optimizer: Optimizer, opened: Opened, start: State, began: int) -> None:
    if isinstance(optimizer, SplitSGD):
        optimizer.param_groups[0]["steps"] = start.step - began
        if "radius" in start.optimizer:
            optimizer.param_groups[0]["radius"] = float(start.optimizer["radius"])
    if not start.optimizer:
        return
    slots = optimizer.state[opened.flat.vector]
    for name, row in start.optimizer.items():
        if row.ndim == 0:
            continue  # a number of the whole group
        slots[name] = torch.from_numpy(row.copy()).to(opened.flat.vector.device)
    if isinstance(optimizer, Adam):
        optimizer.count = start.step - began
