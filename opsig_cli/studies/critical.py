"""Critical sharpness: 2 over the smallest learning rate at which the optimizer's next update would raise the loss.

P parameters. Against 2/eta it says how far the next step is from too long.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from opsig_cli.backends import Session, State, targets_of
from opsig_cli.settings import Settings

QUANTILE = 0.1
"""Of the sizes of the first gradient's entries that are not 0: SplitSGD's radius where none was given."""
LONGEST = 1e8
"""Learning rate up to which a rise is looked for."""
SHORTEST = 1e-12
"""Learning rate below which any rise is one at once."""


def update_direction(settings: Settings | None, state: State, gradient: np.ndarray) -> np.ndarray | None:
    """What the optimizer would add to the parameters, over the learning rate, (P,) float64; None where it is not known.

    `gradient` (P,): that of the whole loss, with which the moments in `state` are advanced by one step. It is not known
    without settings, or where the checkpoint lacks the optimizer's state. SplitSGD: see `opsig_torch.splitsgd`.
    """
    if settings is None or not settings.learning_rate > 0:  # 0 for gradient flow, NaN where it is not known
        return None
    norm = float(np.linalg.norm(gradient))
    if settings.clip_norm is not None and norm > settings.clip_norm:
        gradient = gradient * (settings.clip_norm / norm)
    gradient = gradient + settings.weight_decay * state.params.astype(np.float64)
    kept, step = state.optimizer, state.step - settings.began + 1
    begins = step == 1
    match settings.optimizer:
        case "gd" | "sgd":
            return -gradient
        case "momentum" if begins or "momentum_buffer" in kept:
            moment = _advanced(kept.get("momentum_buffer"), settings.momentum, gradient)
            return -(gradient + settings.momentum * moment) if settings.nesterov else -moment
        case "adam" if begins or {"exp_avg", "exp_avg_sq"} <= kept.keys():
            first = _advanced(kept.get("exp_avg"), settings.beta1, (1 - settings.beta1) * gradient)
            second = _advanced(kept.get("exp_avg_sq"), settings.beta2, (1 - settings.beta2) * gradient**2)
            length = np.sqrt(second / (1 - settings.beta2**step)) + settings.epsilon
            return -first / (1 - settings.beta1**step) / length
        case "splitsgd":
            return _split(settings, state, gradient)
    return None


def _advanced(moment: np.ndarray | None, decay: float, new: np.ndarray) -> np.ndarray:
    return new if moment is None else decay * moment.astype(np.float64) + new


def _split(settings: Settings, state: State, gradient: np.ndarray) -> np.ndarray | None:
    beta, tau = settings.momentum, settings.dampening
    radius = settings.radius if settings.radius is not None else state.optimizer.get("radius")
    buffer = state.optimizer.get("momentum_buffer")
    count = state.step - settings.began
    if count and (radius is None or (buffer is None and (beta or tau))):
        return None
    if radius is None:
        sizes = np.sort(np.abs(gradient[gradient != 0]))
        radius = sizes[max(1, round(QUANTILE * len(sizes))) - 1] if len(sizes) else 0.0
    moment = _advanced(buffer, beta, (1 - tau) * gradient) / (1 - tau ** (count + 1))
    signed = settings.sign_learning_rate / settings.learning_rate * np.sign(moment)
    return -np.where(np.abs(moment) > float(radius), signed, moment)


def critical_sharpness(
    session: Session, state: State, settings: Settings | None, tolerance: float = 0.01
) -> tuple[float, bool]:
    """2 over the smallest learning rate at which the update raises the mean loss, and whether the update is known.

    Where it is not, it is that of gradient descent. 0 where no rate raises the loss, infinity where every one does. For
    gradient descent on a quadratic it is the curvature along the gradient. Costs one gradient and some ten forward
    passes.
    """
    gradient = session.gradient(state).astype(np.float64)  # pyright: ignore
    direction = update_direction(settings, state, gradient)
    known = direction is not None
    if direction is None:
        direction = -gradient
    if direction @ gradient > 0:
        return float("inf"), known
    counts = targets_of(session)
    start = session.losses([state])[0][0][counts].mean(dtype=np.float64)

    def rises(rate: float) -> bool:
        moved = (state.params + rate * direction).astype(state.params.dtype)
        losses = session.losses([replace(state, params=moved)])[0][0][counts]
        return not losses.mean(dtype=np.float64) <= start

    low, high = 0.0, settings.learning_rate if settings is not None and known else 1e-3
    while not rises(high):
        low, high = high, 4 * high
        if high > LONGEST:
            return 0.0, known
    while high - low > tolerance * high:
        middle = (low * high) ** 0.5 if low else high / 4
        low, high = (low, middle) if rises(middle) else (middle, high)
        if high < SHORTEST:
            return float("inf"), known
    return 2 / high, known
