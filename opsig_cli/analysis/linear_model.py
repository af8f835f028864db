"""The paper's two-layer linear model with an outlier feature (section 3.3, Theorems 3.1 and 3.2, App. G).

f = c (b'x + b_o'x_o) is fitted to y = beta'x + |x_o|'1 / sqrt(d2) by square loss. With B = |beta|, everything depends
on epsilon = b'beta / B, delta, the norm of what of b lies across beta, q = 1'b_o / sqrt(d2), o = |b_o|^2 and c. Losses
are exact: 2L = |cb - beta|^2 + alpha (c^2 q^2 + 1). T points of time, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Problem:
    """Sizes d1 < d2 of the two parts of the input, strength alpha of the outlier feature, and B = |beta|.

    Raises ValueError where they are out of range.
    """

    d1: int
    d2: int
    alpha: float
    beta_norm: float

    def __post_init__(self) -> None:
        if not 1 <= self.d1 < self.d2:
            raise ValueError("d1 must be at least 1 and below d2")
        if not (self.alpha > 0 and self.beta_norm > 0):
            raise ValueError("alpha and beta_norm must be positive")

    @property
    def start(self) -> tuple[float, float, float, float]:
        """epsilon, delta, o and c at the start: |b|^2 = d1 / (d1 + d2), |b_o|^2 = d2 / (d1 + d2), c = 1."""
        total = self.d1 + self.d2
        return total**-0.5, ((self.d1 - 1) / total) ** 0.5, self.d2 / total, 1.0

    def sharpness(self, epsilon: float, delta: float, o: float, c: float) -> float:
        """Largest eigenvalue of the Hessian, that of its block on (beta, the rest of b, b_o, c) (corrected eq. 8)."""
        beside = np.array([2 * c * epsilon - self.beta_norm, 2 * c * delta, 2 * self.alpha * c * o**0.5])
        matrix = np.diag([c * c, c * c, self.alpha * c * c, epsilon**2 + delta**2 + self.alpha * o])
        matrix[:3, 3] = matrix[3, :3] = beside
        return float(np.linalg.eigvalsh(matrix)[-1])

    def loss(self, epsilon: float, delta: float, o: float, c: float) -> float:
        """The population loss L."""
        across = (c * epsilon - self.beta_norm) ** 2 + (c * delta) ** 2
        return (across + self.alpha * (c * c * o + 1)) / 2

    @property
    def time_bound(self) -> float:
        """ln(B/2) / (2B), Theorem 3.1's bound on the time at which c begins to grow; NaN for B <= 2."""
        return float(np.log(self.beta_norm / 2) / (2 * self.beta_norm)) if self.beta_norm > 2 else float("nan")


@dataclass(frozen=True)
class Flow:
    """Gradient flow: `state(t)` gives epsilon, delta, ln o and c at any time up to `end`."""

    problem: Problem
    state: Callable[[float], np.ndarray]
    end: float
    t1: float

    def sharpness(self, time: float) -> float:
        """Sharpness at a time."""
        epsilon, delta, ln_o, c = self.state(time)
        return self.problem.sharpness(epsilon, delta, float(np.exp(ln_o)), c)

    def loss(self, time: float) -> float:
        """Population loss at a time."""
        epsilon, delta, ln_o, c = self.state(time)
        return self.problem.loss(epsilon, delta, float(np.exp(ln_o)), c)


def gradient_flow(problem: Problem, end: float | None = None) -> Flow:
    """Integrate gradient flow, ln o in the place of o, which underflows, up to `end` (default: 10 / B).

    epsilon' = -c^2 epsilon + cB, delta' = -c^2 delta, (ln o)' = -2 alpha c^2,
    c' = -c (epsilon^2 + delta^2 + alpha o) + epsilon B; t1 is where c' first becomes 0.
    """
    from scipy.integrate import solve_ivp

    alpha, size = problem.alpha, problem.beta_norm
    end = 10 / size if end is None else end

    def rates(_: float, state: np.ndarray) -> list[float]:
        epsilon, delta, ln_o, c = state
        growth = -c * (epsilon**2 + delta**2 + alpha * np.exp(ln_o)) + epsilon * size
        return [-c * c * epsilon + c * size, -c * c * delta, -2 * alpha * c * c, growth]

    def turning(time: float, state: np.ndarray) -> float:
        return rates(time, state)[3]

    epsilon, delta, o, c = problem.start
    solved: Any = solve_ivp(
        rates, (0, end), [epsilon, delta, np.log(o), c], method="DOP853", rtol=1e-12, atol=1e-14, dense_output=True,
        events=turning,
    )  # fmt: skip
    times = solved.t_events[0]
    return Flow(problem, solved.sol, end, float(times[0]) if len(times) else float("nan"))


def summarise_flow(flow: Flow) -> dict[str, Any]:
    """Sharpness at the start, its minimum and its limit, their times, and the theorems' claims."""
    from scipy.optimize import brentq, minimize_scalar

    problem = flow.problem
    times = np.concatenate([[0], np.geomspace(flow.end * 1e-6, flow.end, 4000)])
    values = np.array([flow.sharpness(time) for time in times])
    lowest = int(values.argmin())
    low, high = times[max(0, lowest - 1)], times[min(len(times) - 1, lowest + 1)]
    found: Any = minimize_scalar(flow.sharpness, bounds=(low, high), method="bounded", options={"xatol": 1e-12})
    goal = 5 / 8 * problem.alpha * problem.beta_norm
    time_of_bound = float("nan")
    after = np.flatnonzero((times > found.x) & (values >= goal))
    if len(after):
        begin, end = max(float(found.x), float(times[after[0] - 1])), float(times[after[0]])
        time_of_bound = begin
        if flow.sharpness(begin) < goal:
            time_of_bound = float(brentq(lambda t: flow.sharpness(t) - goal, begin, end, xtol=1e-13))  # pyright: ignore
    epsilon, delta, o, c = problem.start
    return {
        "sharpness_initial": problem.sharpness(epsilon, delta, o, c),
        "sharpness_min": float(found.fun),
        "time_of_min": float(found.x),
        "t1": flow.t1,
        "t1_bound": problem.time_bound,
        "time_of_bound": time_of_bound,
        "sharpness_final": max(problem.alpha, 2.0) * problem.beta_norm,
    } | theorems(flow, float(found.fun), time_of_bound)


def theorems(flow: Flow, lowest: float, time_of_bound: float) -> dict[str, Any]:
    """Each assumption and each conclusion of Theorems 3.1 and 3.2, true or false for this problem."""
    problem = flow.problem
    ratio, size, alpha = problem.d2 / problem.d1, problem.beta_norm, problem.alpha
    first = problem.sharpness(*problem.start)
    wide = size > max(problem.d1 / (problem.d1 + problem.d2) ** 0.5, 24 / 5)
    steep = size > 2 and alpha**0.5 >= (1 + ratio) * np.log(ratio) * size / np.log(size / 2)
    return {
        "theorem_3_1": {
            "assumption_beta_norm": bool(wide),
            "assumption_alpha": bool(steep),
            "initial_sharpness_between_alpha_and_3_alpha": bool(alpha < first < 3 * alpha),
            "sharpness_falls_first": bool(lowest < first),
            "t1_within_bound": bool(flow.t1 <= problem.time_bound),
        },
        "theorem_3_2": {
            "assumption_beta_norm": bool(wide),
            "assumption_alpha": bool(steep),
            "sharpness_rises_to_5_8_alpha_b": bool(np.isfinite(time_of_bound)),
        },
    }


@dataclass(frozen=True)
class Descent:
    """Gradient descent: (T,) arrays with one entry a step, the start included; `diverged_at` is a step or None.

    `losses_TN` are those of `names`: N samples, or groups of them.
    """

    epsilon: np.ndarray
    delta: np.ndarray
    q_sign: np.ndarray
    q_log: np.ndarray
    c: np.ndarray
    sharpness: np.ndarray
    loss: np.ndarray
    losses_TN: np.ndarray
    diverged_at: int | None

    @property
    def feature(self) -> np.ndarray:
        """cq, the outlier feature's use, with its sign."""
        with np.errstate(under="ignore"):
            return self.c * self.q_sign * np.exp(self.q_log)


def population_descent(problem: Problem, learning_rate: float, steps: int, probability: float = 0.05) -> Descent:
    """Gradient descent on the population loss; q is carried as a sign and ln |q|, because it underflows.

    The three samples are the two outlier groups, L+- = |cb - beta|^2 / 2 + alpha / (2p) (1 -+ cq)^2, and the rest.
    """
    alpha, size = problem.alpha, problem.beta_norm
    epsilon, delta, o, c = problem.start
    sign, log_q = 1.0, 0.5 * np.log(o)
    rows = []
    losses = []
    diverged = None
    for step in range(steps + 1):
        q2 = float(np.exp(2 * log_q))
        loss = problem.loss(epsilon, delta, q2, c)
        if not np.isfinite(loss) or loss > 1e12:
            diverged = step
            break
        rows.append((epsilon, delta, sign, log_q, c, problem.sharpness(epsilon, delta, q2, c), loss))
        common = ((c * epsilon - size) ** 2 + (c * delta) ** 2) / 2
        used = c * sign * float(np.exp(log_q))
        outliers = [common + alpha / (2 * probability) * (1 - s * used) ** 2 for s in (1, -1)]
        losses.append([*outliers, common])
        slope = c * (epsilon**2 + delta**2 + alpha * q2) - epsilon * size
        shrink = 1 - learning_rate * alpha * c * c
        epsilon, delta, c = (
            epsilon - learning_rate * (c * c * epsilon - c * size),
            delta * (1 - learning_rate * c * c),
            c - learning_rate * slope,
        )
        sign *= float(np.sign(shrink))
        log_q += float(np.log(abs(shrink))) if shrink else -np.inf
    columns = np.array(rows).T
    return Descent(*columns, losses_TN=np.array(losses), diverged_at=diverged)


def sampled_descent(
    problem: Problem, learning_rate: float, steps: int, samples: int = 1000, probability: float = 0.05,
    loss: str = "square", seed: int = 0,
) -> tuple[Descent, np.ndarray]:  # fmt: skip
    """Gradient descent over drawn samples, and each sample's side: +1 or -1 of the outliers, 0 for the rest, (N,).

    x is normal, x_o = +-sqrt(alpha / (p d2)) 1 for a share p of the samples, as often + as -. `loss` is square, or
    cross-entropy of the sign of y. Sharpness is that of the loss over the samples.
    """
    generator = np.random.default_rng(seed)
    d1, alpha, size = problem.d1, problem.alpha, problem.beta_norm
    half = round(samples * probability / 2)
    side = np.zeros(samples)
    side[: 2 * half] = np.repeat([1, -1], half)
    x = generator.standard_normal((samples, d1))
    beta = generator.standard_normal(d1)
    beta *= size / np.linalg.norm(beta)
    outlier = side * (alpha / probability) ** 0.5  # 1'x_o / sqrt(d2)
    y = x @ beta + np.abs(outlier)
    epsilon, delta, o, c = problem.start
    across = generator.standard_normal(d1)
    across -= across @ beta / size**2 * beta
    b = epsilon * beta / size + (delta * across / np.linalg.norm(across) if d1 > 1 else 0)
    q = o**0.5
    rows, losses = [], []
    diverged = None
    inputs = np.concatenate([x, outlier[:, None]], 1)
    target = np.sign(y)
    for step in range(steps + 1):
        weights = np.append(b, q)
        hidden = inputs @ weights
        if loss == "square":
            errors = c * hidden - y
            row, slope, bend = errors**2 / 2, errors, np.ones(samples)
        else:
            margin = target * c * hidden
            row = np.logaddexp(0, -margin)
            chance = 1 / (1 + np.exp(np.minimum(margin, 700)))
            slope, bend = -target * chance, chance * (1 - chance)
        mean = float(row.mean())
        if not np.isfinite(mean) or mean > 1e12:
            diverged = step
            break
        hessian = np.empty((d1 + 2, d1 + 2))
        hessian[:-1, :-1] = c * c * inputs.T @ (bend[:, None] * inputs) / samples
        hessian[:-1, -1] = hessian[-1, :-1] = inputs.T @ (bend * c * hidden + slope) / samples
        hessian[-1, -1] = (bend * hidden**2).mean()
        along = float(b @ beta / size)
        rest = float(np.linalg.norm(b - along * beta / size))
        log_q = float(np.log(abs(q))) if q else -np.inf
        rows.append((along, rest, float(np.sign(q)), log_q, c, float(np.linalg.eigvalsh(hessian)[-1]), mean))
        losses.append(row)
        gradient = c * inputs.T @ slope / samples
        c -= learning_rate * float((slope * hidden).mean())
        weights = weights - learning_rate * gradient
        b, q = weights[:-1], float(weights[-1])
    columns = np.array(rows).T
    return Descent(*columns, losses_TN=np.array(losses), diverged_at=diverged), side


def summarise_descent(descent: Descent, learning_rate: float) -> dict[str, Any]:
    """Sharpness at the start, its minimum and end, the step at which it crosses 2 / eta after the minimum, and the
    largest |cq| from there on: how far the feature comes back."""
    values = descent.sharpness
    lowest = int(values.argmin())
    crossed = np.flatnonzero(values[lowest:] >= 2 / learning_rate)
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
