"""The paper's two-layer linear model with an outlier feature (section 3.3, Theorems 3.1 and 3.2, App. G).

f = c (b'x + b_o'x_o) is fitted to y = beta'x + |x_o|'1 / sqrt(d2) by square loss. With B = |beta|, everything depends
on epsilon = b'beta / B, delta, the norm of what of b lies across beta, q = 1'b_o / sqrt(d2), o = |b_o|^2 and c. Losses
are exact: 2L = |cb - beta|^2 + alpha (c^2 q^2 + 1). T points of time, P = d1 + d2 + 1 parameters b, b_o, c.
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
        if not (0 < self.alpha < np.inf and 0 < self.beta_norm < np.inf):
            raise ValueError("alpha and beta_norm must be positive and finite")

    @property
    def start(self) -> tuple[float, float, float, float]:
        """epsilon, delta, o and c at the start: |b|^2 = d1 / (d1 + d2), |b_o|^2 = d2 / (d1 + d2), c = 1."""
        total = self.d1 + self.d2
        return total**-0.5, ((self.d1 - 1) / total) ** 0.5, self.d2 / total, 1.0

    @property
    def invariant(self) -> float:
        """K = c^2 - |b|^2 - |b_o|^2, which gradient flow keeps; 0 for the paper's start."""
        epsilon, delta, o, c = self.start
        return c * c - epsilon**2 - delta**2 - o

    @property
    def limit(self) -> float:
        """Sharpness where gradient flow ends, cb = beta, b_o = 0, c^2 - |b|^2 = K: max(alpha, 2) B for K = 0."""
        c = ((self.invariant + (self.invariant**2 + 4 * self.beta_norm**2) ** 0.5) / 2) ** 0.5
        return self.curvature(self.beta_norm / c, 0.0, 0.0, c)[0]

    def curvature(self, epsilon: float, delta: float, q: float, c: float) -> tuple[float, np.ndarray]:
        """Largest eigenvalue of the Hessian and its eigenvector on (beta, the rest of b, b_o, c), (4,).

        Eq. 8 of the paper, whose block on b and c lacks -beta; q carries the sign of b_o.
        """
        beside = np.array([2 * c * epsilon - self.beta_norm, 2 * c * delta, 2 * self.alpha * c * q])
        matrix = np.diag([c * c, c * c, self.alpha * c * c, epsilon**2 + delta**2 + self.alpha * q * q])
        matrix[:3, 3] = matrix[3, :3] = beside
        values, vectors = np.linalg.eigh(matrix)
        return float(values[-1]), vectors[:, -1]

    def loss(self, epsilon: float, delta: float, q: float, c: float) -> float:
        """The population loss L."""
        across = (c * epsilon - self.beta_norm) ** 2 + (c * delta) ** 2
        return (across + self.alpha * (c * c * q * q + 1)) / 2

    def group_losses(self, epsilon: float, delta: float, q: float, c: float, probability: float) -> np.ndarray:
        """Mean losses of the outliers of either sign, |cb - beta|^2 / 2 + alpha (1 -+ cq)^2 / (2p), and of the rest."""
        rest = ((c * epsilon - self.beta_norm) ** 2 + (c * delta) ** 2) / 2
        outliers = [self.alpha / (2 * probability) * (1 - sign * c * q) ** 2 for sign in (1, -1)]
        return np.array([rest + outliers[0], rest + outliers[1], rest])

    def embed(self, along: np.ndarray, across: np.ndarray, q: np.ndarray, c: np.ndarray) -> np.ndarray:
        """Rows of all parameters (b, b_o, c), (T, P), for (T,) coordinates; beta is along the first axis of b."""
        rows = np.zeros((len(along), self.d1 + self.d2 + 1))
        rows[:, 0] = along
        if self.d1 > 1:
            rows[:, 1] = across
        rows[:, self.d1 : -1] = q[:, None] / self.d2**0.5
        rows[:, -1] = c
        return rows

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

    def at(self, time: float) -> tuple[float, float, float, float]:
        """epsilon, delta, q and c at a time."""
        epsilon, delta, ln_o, c = map(float, self.state(time))
        return epsilon, delta, float(np.exp(ln_o / 2)), c

    def sharpness(self, time: float) -> float:
        """Sharpness at a time."""
        return self.problem.curvature(*self.at(time))[0]

    def loss(self, time: float) -> float:
        """Population loss at a time."""
        return self.problem.loss(*self.at(time))


def gradient_flow(problem: Problem, end: float | None = None) -> Flow:
    """Integrate gradient flow, ln o in the place of o, which underflows, up to `end` (default: 10 / B).

    epsilon' = -c^2 epsilon + cB, delta' = -c^2 delta, (ln o)' = -2 alpha c^2,
    c' = -c (epsilon^2 + delta^2 + alpha o) + epsilon B; t1 is where c begins to grow, else NaN.
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

    turning.direction = 1  # pyright: ignore[reportFunctionMemberAccess]
    epsilon, delta, o, c = problem.start
    solved: Any = solve_ivp(
        rates, (0, end), [epsilon, delta, np.log(o), c], method="DOP853", rtol=1e-12, atol=1e-14, dense_output=True,
        events=turning,
    )  # fmt: skip
    if turning(0, solved.y[:, 0]) >= 0:
        return Flow(problem, solved.sol, end, 0.0)
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
    return {
        "sharpness_initial": float(values[0]),
        "sharpness_min": float(found.fun),
        "time_of_min": float(found.x),
        "t1": flow.t1,
        "t1_bound": problem.time_bound,
        "time_of_bound": time_of_bound,
        "sharpness_final": problem.limit,
    } | theorems(flow, time_of_bound)


def theorems(flow: Flow, time_of_bound: float) -> dict[str, Any]:
    """Assumptions and conclusions of Theorems 3.1 and 3.2, each true or false for this problem.

    The paper states the assumption on alpha up to a constant. Here are the inequalities that its proof uses (App. G),
    with k = d2 / d1: sqrt(alpha) >= (1 + k) ln(k) B / ln(B/2), and for eq. 67 sqrt(alpha) > 1 + k ln k.
    """
    problem = flow.problem
    k, size, alpha = problem.d2 / problem.d1, problem.beta_norm, problem.alpha
    c2_bound = 1 / (1 + k)  # the proof's m, below which c^2 does not fall while c falls
    first = flow.sharpness(0)
    times = np.linspace(0, flow.t1 if np.isfinite(flow.t1) else flow.end, 1000)
    falling = np.diff([flow.sharpness(time) for time in times])
    ln_o = np.array([flow.state(time)[2] for time in times])
    assumed = {
        "assumption_beta_norm": bool(size > max(problem.d1 / (problem.d1 + problem.d2) ** 0.5, 24 / 5)),
        "assumption_alpha": bool(size > 2 and alpha**0.5 >= (1 + k) * np.log(k) * size / np.log(size / 2)),
    }
    return {
        "theorem_3_1": assumed | {
            "initial_sharpness_between_alpha_and_3_alpha": bool(alpha < first < 3 * alpha),
            "b_o_falls_exponentially_until_t1": bool((ln_o <= ln_o[0] - 2 * alpha * c2_bound * times + 1e-9).all()),
            "sharpness_falls_until_t1": bool((falling < 0).all()),
            "t1_within_bound": bool(flow.t1 <= problem.time_bound),
        },
        "theorem_3_2": assumed | {
            "assumption_alpha_for_the_tail": bool(alpha**0.5 > 1 + k * np.log(k)),
            "sharpness_rises_to_5_8_alpha_b": bool(np.isfinite(time_of_bound)),
            "each_dimension_of_b_o_reaches_it": bool(flow.at(flow.end)[3] ** 2 >= 5 / 8 * size),
        },
    }  # fmt: skip
