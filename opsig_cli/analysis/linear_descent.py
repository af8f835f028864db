"""Gradient descent in the two-layer linear model: on the population loss, and on drawn samples.

T steps, the start included, N samples, P = d1 + d2 + 1 parameters b, b_o, c. Letters as in `linear_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.analysis.linear_model import Problem

PROBABILITY = 0.05
"""Share p of the samples that carry the outlier feature."""
SAMPLES = 1000
DIVERGED = 1e12


@dataclass(frozen=True)
class Samples:
    """Drawn samples: x (N, d1), `side` (N,) +1 or -1 of the outliers and 0 of the rest, outlier = 1'x_o / sqrt(d2) and
    targets y (N,); the target's weights beta and the first b (d1,)."""

    x: np.ndarray
    side: np.ndarray
    outlier: np.ndarray
    y: np.ndarray
    beta: np.ndarray
    b: np.ndarray


def draw(problem: Problem, samples: int, probability: float, seed: int) -> Samples:
    """x normal; x_o = +-sqrt(alpha / (p d2)) 1 for a share p of the samples, as often + as -, else 0.

    Raises ValueError where there is not one outlier of each sign.
    """
    side = sides(probability, samples)
    if not side.any():
        raise ValueError(f"{samples} samples leave no outlier of either sign")
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((samples, problem.d1))
    beta = generator.standard_normal(problem.d1)
    beta *= problem.beta_norm / np.linalg.norm(beta)
    outlier = side * (problem.alpha / probability) ** 0.5
    epsilon, delta, _, _ = problem.start
    across = generator.standard_normal(problem.d1)
    across -= across @ beta / problem.beta_norm**2 * beta
    b = epsilon * beta / problem.beta_norm
    if problem.d1 > 1:
        b = b + delta * across / np.linalg.norm(across)
    return Samples(x, side, outlier, x @ beta + np.abs(outlier), beta, b)


@dataclass(frozen=True)
class Descent:
    """Gradient descent, one entry a step, (T,); `diverged_at` is a step or None.

    `losses_TN` are those of the samples, `params_TP` all parameters, `eigenvectors_TP` the Hessian's first eigenvector.
    """

    epsilon: np.ndarray
    delta: np.ndarray
    q_sign: np.ndarray
    q_log: np.ndarray
    c: np.ndarray
    sharpness: np.ndarray
    loss: np.ndarray
    losses_TN: np.ndarray
    params_TP: np.ndarray
    eigenvectors_TP: np.ndarray
    diverged_at: int | None

    @property
    def q(self) -> np.ndarray:
        """q with its sign, 0 where it underflows."""
        with np.errstate(under="ignore"):
            return self.q_sign * np.exp(self.q_log)

    @property
    def feature(self) -> np.ndarray:
        """cq, the outlier feature's use, with its sign."""
        return self.c * self.q


def sides(probability: float, count: int = SAMPLES) -> np.ndarray:
    """+1 and -1 for a share `probability` of the samples, as often + as -, and 0 for the rest, (N,).

    >>> sides(0.5, 4)
    array([ 1., -1.,  0.,  0.])
    """
    half = round(count * probability / 2)
    side = np.zeros(count)
    side[: 2 * half] = np.repeat([1, -1], half)
    return side


def population_descent(problem: Problem, learning_rate: float, steps: int) -> Descent:
    """Gradient descent on the population loss; q is carried as a sign and ln |q|, because it underflows.

    SAMPLES samples stand for the population, each with the mean loss of its group, whose mean is the population loss.
    """
    epsilon, delta, o, c = map(np.float64, problem.start)
    sign, log_q = 1.0, 0.5 * np.log(o)
    rows, losses, vectors = [], [], []
    diverged = None
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for step in range(steps + 1):
            q = sign * np.exp(log_q)
            loss = problem.loss(epsilon, delta, q, c)
            if not loss <= DIVERGED:
                diverged = step
                break
            sharpness, vector = problem.curvature(epsilon, delta, q, c)
            rows.append((epsilon, delta, sign, log_q, c, sharpness, loss))
            losses.append(problem.group_losses(epsilon, delta, q, c, PROBABILITY))
            vectors.append(vector)
            slope = c * (epsilon**2 + delta**2 + problem.alpha * q * q) - epsilon * problem.beta_norm
            shrink = 1 - learning_rate * problem.alpha * c * c
            epsilon, delta, c = (
                epsilon - learning_rate * (c * c * epsilon - c * problem.beta_norm),
                delta * (1 - learning_rate * c * c),
                c - learning_rate * slope,
            )
            sign *= np.sign(shrink)
            log_q += np.log(abs(shrink)) if shrink else -np.inf
    columns = np.array(rows).T
    side = sides(PROBABILITY)
    return Descent(
        *columns,
        losses_TN=np.array(losses)[:, np.select([side == 1, side == -1], [0, 1], 2)],
        params_TP=problem.embed(columns[0], columns[1], columns[2] * np.exp(columns[3]), columns[4]),
        eigenvectors_TP=problem.embed(*np.array(vectors).T),
        diverged_at=diverged,
    )


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def sampled_descent(
    problem: Problem, learning_rate: float, steps: int, drawn: Samples, loss: str = "square"
) -> Descent:
    """Gradient descent over drawn samples by `loss`: square, or cross-entropy of the sign of y.

    Sharpness is that of the loss over the samples.
    """
    d1, size, count = problem.d1, problem.beta_norm, len(drawn.y)
    _, _, o, c = problem.start
    weights = np.append(drawn.b, o**0.5)
    inputs = np.concatenate([drawn.x, drawn.outlier[:, None]], 1)
    rows, losses, params, vectors = [], [], [], []
    diverged = None
    for step in range(steps + 1):
        hidden = inputs @ weights
        row, slope, bend = _losses(c * hidden, drawn.y, loss)
        mean = float(row.mean())
        if not mean <= DIVERGED:
            diverged = step
            break
        hessian = np.empty((d1 + 2, d1 + 2))
        hessian[:-1, :-1] = c * c * inputs.T @ (bend[:, None] * inputs) / count
        hessian[:-1, -1] = hessian[-1, :-1] = inputs.T @ (bend * c * hidden + slope) / count
        hessian[-1, -1] = (bend * hidden**2).mean()
        values, basis = np.linalg.eigh(hessian)
        b, q = weights[:-1], float(weights[-1])
        along = float(b @ drawn.beta / size)
        across = float(np.linalg.norm(b - along * drawn.beta / size))
        log_q = float(np.log(abs(q))) if q else -np.inf
        rows.append((along, across, float(np.sign(q)), log_q, c, float(values[-1]), mean))
        losses.append(row)
        params.append(np.append(weights, c))
        vectors.append(basis[:, -1])
        gradient = c * inputs.T @ slope / count
        c -= learning_rate * float((slope * hidden).mean())
        weights = weights - learning_rate * gradient
    return Descent(
        *np.array(rows).T,
        losses_TN=np.array(losses),
        params_TP=_spread(np.array(params), d1, problem.d2),
        eigenvectors_TP=_spread(np.array(vectors), d1, problem.d2),
        diverged_at=diverged,
    )


def _losses(outputs: np.ndarray, y: np.ndarray, loss: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every sample's loss, and its first and second derivative by the output, (N,) each."""
    if loss == "square":
        errors = outputs - y
        return errors**2 / 2, errors, np.ones(len(y))
    target = np.sign(y)
    margin = target * outputs
    chance = 1 / (1 + np.exp(np.minimum(margin, 700)))
    return np.logaddexp(0, -margin), -target * chance, chance * (1 - chance)


def _spread(rows: np.ndarray, d1: int, d2: int) -> np.ndarray:
    """Rows of (b, q, c), (T, d1 + 2), as rows of (b, b_o, c), (T, P), with b_o = q 1 / sqrt(d2)."""
    outlier = np.repeat(rows[:, d1 : d1 + 1] / d2**0.5, d2, axis=1)
    return np.concatenate([rows[:, :d1], outlier, rows[:, -1:]], 1)


def summarise_descent(descent: Descent, learning_rate: float) -> dict[str, Any]:
    """Sharpness at the start, its minimum and end, the step at which it crosses 2 / eta after the minimum, and the
    largest |cq| from there on: how far the feature comes back."""
    values = descent.sharpness
    lowest = int(values.argmin())
    crossed = np.flatnonzero(values[lowest:] >= 2 / learning_rate) if learning_rate else np.empty(0, int)
    crossing = lowest + int(crossed[0]) if len(crossed) else None
    feature = np.abs(descent.feature)
    peak = None if crossing is None else crossing + int(feature[crossing:].argmax())
    return {
        "sharpness_initial": float(values[0]),
        "sharpness_min": float(values[lowest]),
        "time_of_min": lowest,
        "sharpness_final": float(values[-1]),
        "crossing_step": crossing,
        "peak_feature": None if peak is None else float(feature[peak]),
        "peak_step": peak,
        "diverged_at": descent.diverged_at,
    }
