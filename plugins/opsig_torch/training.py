"""Training that records as it goes. S samples, P parameters.

A run is a function of its first state, the seed and the step number alone (minibatch order and dropout are drawn
from the seed and the step), so that a resumed run repeats an uninterrupted one bit for bit on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from opsig_cli.backends import Snapshot, State, Training
from opsig_cli.errors import UsageError
from opsig_torch.session import LossRow
from opsig_torch.splitsgd import SignSGD, SplitSGD

if TYPE_CHECKING:
    from opsig_torch.session import TorchSession


def train(session: TorchSession, training: Training, start: State) -> Iterator[Snapshot]:
    """Train from `start` and yield a snapshot of every step up to `training.steps`, both included.

    A full-batch snapshot's losses come from the forward pass that trains; a minibatch run measures them in a pass of
    their own. `train_loss` and `grad_norm` are those of the minibatch where there is one.
    """
    optimizer = _optimizer(session, training)
    session.flat.load(start)
    _restore(optimizer, session, start)
    gradient = _full_batch_gradient if training.batch_size is None else _minibatch_gradient
    for step in range(start.step, training.steps + 1):
        wants_losses = training.wants_losses(step)
        state = _state(session, optimizer, step) if training.wants_state(step) else None
        train_loss, row = gradient(session, training, step, wants_losses)
        grad_norm = session.flat.gradient.norm().item()
        update_norm = float("nan")
        if step < training.steps:
            before = session.flat.vector.detach().clone()
            optimizer.step()
            update_norm = torch.dist(session.flat.vector.detach(), before).item()
        losses, predictions = row.arrays() if row is not None and wants_losses else (None, None)
        signed = optimizer.signed_fraction if isinstance(optimizer, SplitSGD) else float("nan")
        yield Snapshot(
            step, train_loss, training.learning_rate, grad_norm, update_norm, losses, predictions, state, signed
        )  # fmt: skip


def _full_batch_gradient(session: TorchSession, training: Training, step: int, _: bool) -> tuple[float, LossRow]:
    """Gradient of the mean loss into `flat.gradient`, batch by batch, and every sample's loss on the way."""
    session.measuring_mode()
    session.flat.gradient.zero_()
    row = LossRow(session.samples)
    for indices, batch in session.batches:
        losses, predictions = session.forward(batch)
        row.put(indices, losses, predictions)
        (losses.sum() / session.samples).backward()
    return row.mean(), row


def _minibatch_gradient(
    session: TorchSession, training: Training, step: int, wants_losses: bool
) -> tuple[float, LossRow | None]:
    assert training.batch_size is not None
    row = None
    if wants_losses:
        row = LossRow(session.samples)
        session.measuring_mode()
        buffers = [buffer.clone() for _, buffer in session.flat.buffers]  # measuring must not move running statistics
        with torch.no_grad():
            for indices, batch in session.batches:
                row.put(indices, *session.forward(batch))
            for (_, buffer), saved in zip(session.flat.buffers, buffers, strict=True):
                buffer.copy_(saved)
    session.flat.model.train()
    torch.manual_seed(int(np.random.SeedSequence([training.seed, step]).generate_state(1)[0]))
    session.flat.gradient.zero_()
    chosen = minibatch(session.samples, training.batch_size, training.seed, step)
    losses = session.task.losses(session.flat.model, session.batches.take(chosen))
    mean = losses.mean()
    mean.backward()
    return mean.item(), row


def minibatch(samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Indices of the minibatch of a step; an epoch is a permutation drawn from (seed, epoch), its last batch smaller.

    >>> sorted(np.concatenate([minibatch(5, 2, 0, step) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4]
    """
    epoch, position = divmod(step, -(-samples // batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return order[position * batch_size : (position + 1) * batch_size]


def _optimizer(session: TorchSession, training: Training) -> torch.optim.Optimizer:
    vector = [session.flat.vector]
    rate, decay = training.learning_rate, training.weight_decay
    match training.optimizer:
        case "gd" | "sgd":
            return torch.optim.SGD(vector, lr=rate, weight_decay=decay)
        case "momentum":
            return torch.optim.SGD(vector, lr=rate, momentum=training.momentum, weight_decay=decay)
        case "adam":
            return torch.optim.Adam(vector, lr=rate, betas=training.betas, eps=training.epsilon, weight_decay=decay)
        case "splitsgd" | "signsgd" if decay:
            raise UsageError(f"{training.optimizer} has no weight decay. Leave --weight-decay out")
        case "signsgd":
            return SignSGD(vector, rate)
        case "splitsgd":
            return SplitSGD(
                vector, rate, training.sign_learning_rate, training.momentum, training.dampening, training.radius
            )
    raise UsageError(f"no optimizer is called '{training.optimizer}'. Known: {', '.join(session.optimizers)}")


def _state(session: TorchSession, optimizer: torch.optim.Optimizer, step: int) -> State:
    slots = optimizer.state.get(session.flat.vector, {})
    kept = {
        name: value.detach().cpu().numpy().copy()
        for name, value in slots.items()
        if isinstance(value, torch.Tensor) and value.shape == session.flat.vector.shape
    }
    radius = optimizer.param_groups[0].get("radius")
    if radius is not None:
        kept["radius"] = np.asarray(radius, np.float64)
    plain = session.state(step)
    return State(step, plain.params, plain.buffers, kept)


def _restore(optimizer: torch.optim.Optimizer, session: TorchSession, start: State) -> None:
    if isinstance(optimizer, SplitSGD):
        optimizer.param_groups[0]["steps"] = start.step
        if "radius" in start.optimizer:
            optimizer.param_groups[0]["radius"] = float(start.optimizer["radius"])
    if not start.optimizer:
        return
    slots = optimizer.state[session.flat.vector]
    for name, row in start.optimizer.items():
        if row.ndim == 0:
            continue  # a number of the whole group
        slots[name] = torch.from_numpy(row.copy()).to(session.flat.vector.device)
    if isinstance(optimizer, torch.optim.Adam):
        slots["step"] = torch.tensor(float(start.step))
