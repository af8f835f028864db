"""The theory's runs: what they record, and writing them as trajectories. T points of time, N samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opsig_cli.analysis import linear_model
from opsig_cli.analysis import valley as toy
from opsig_cli.errors import UsageError
from opsig_cli.recorder import Recorder

DYNAMICS = ("flow", "gd", "sampled")
LOSSES = ("square", "cross-entropy")
FLOW_POINTS = 400


@dataclass(frozen=True)
class Simulation:
    """One simulated run: its record, and over time (T,) the loss, the groups' losses, and the sharpness.

    `losses_TN` and `labels` are of the samples; `truth` (N,) their planted sides or None; `threshold` 2 / eta or NaN.
    """

    title: str
    record: Mapping[str, Any]
    times: np.ndarray
    loss: np.ndarray
    groups: Mapping[str, np.ndarray]
    sharpness: np.ndarray
    losses_TN: np.ndarray
    labels: list[str]
    learning_rate: float = float("nan")
    threshold: float = float("nan")
    truth: np.ndarray | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)


def linear(
    dynamics: str, d1: int, d2: int, alpha: float, beta_norm: float, learning_rate: float, steps: int, loss: str,
    seed: int,
) -> Simulation:  # fmt: skip
    """The two-layer linear model by gradient flow, population descent, or descent over samples.

    Raises UsageError for unknown dynamics or losses, or sizes out of range.
    """
    if dynamics not in DYNAMICS:
        raise UsageError(f"no dynamics are called '{dynamics}'. Known: {', '.join(DYNAMICS)}")
    if loss not in LOSSES:
        raise UsageError(f"--loss is square or cross-entropy, not '{loss}'")
    try:
        problem = linear_model.Problem(d1, d2, alpha, beta_norm)
    except ValueError as error:
        raise UsageError(str(error)) from error
    about = {"dynamics": dynamics, "d1": d1, "d2": d2, "alpha": alpha, "beta_norm": beta_norm}
    title = f"two-layer linear model, {dynamics}: d1 {d1}, d2 {d2}, alpha {alpha:g}, |beta| {beta_norm:g}"
    theory = linear_model.summarise_flow(linear_model.gradient_flow(problem))
    if dynamics == "flow":
        flow = linear_model.gradient_flow(problem)
        times = np.linspace(0, flow.end, FLOW_POINTS)
        whole = np.array([flow.loss(time) for time in times])
        sharpness = np.array([flow.sharpness(time) for time in times])
        record = about | {"learning_rate": None} | theory | {"crossing_step": None, "peak_feature": None}
        return Simulation(title, record, times, whole, {}, sharpness, whole[:, None], ["population"])
    if dynamics == "gd":
        found = linear_model.population_descent(problem, learning_rate, steps)
        labels = ["outlier +", "outlier -", "all others"]
        groups = dict(zip(labels, found.losses_TN.T, strict=True))
        truth = np.array([0, 1, -1])
    else:
        found, side = linear_model.sampled_descent(problem, learning_rate, steps, loss=loss, seed=seed)
        names = {1: "outlier +", -1: "outlier -", 0: "other"}
        labels = [names[s] for s in side.astype(int).tolist()]
        groups = {name: found.losses_TN[:, side == s].mean(1) for s, name in names.items()}
        truth = np.select([side == 1, side == -1], [0, 1], -1)
        about |= {"loss": loss, "seed": seed}
    record = about | {"learning_rate": learning_rate} | theory | linear_model.summarise_descent(found, learning_rate)
    return Simulation(
        f"{title}, learning rate {learning_rate:g}", record, np.arange(len(found.loss)), found.loss, groups,
        found.sharpness, found.losses_TN, labels, learning_rate, 2 / learning_rate if learning_rate else float("nan"),
        truth,
    )  # fmt: skip


def valley(learning_rate: float, steps: int) -> Simulation:
    """Gradient descent in the toy valley from (u, v) = (1, 0.1)."""
    place = toy.Valley()
    path = toy.descend(place, learning_rate, steps)
    losses = np.array([place.losses(u, v) for u, v in path])
    whole = np.array([place.loss(u, v) for u, v in path])
    sharpness = np.array([place.sharpness(u, v) for u, v in path])
    threshold = 2 / learning_rate if learning_rate else float("nan")
    crossed = np.flatnonzero(sharpness >= threshold)
    labels = ["plane", "other", "all others"]
    record = {
        "learning_rate": learning_rate,
        "steps": len(path) - 1,
        "threshold": threshold,
        "crossing_step": int(crossed[0]) if len(crossed) else None,
        "peak_step": int(whole[10:].argmax()) + 10 if len(whole) > 10 else None,
        "u": path[:, 0],
        "v": path[:, 1],
        "loss": whole,
        "sharpness": sharpness,
    }
    return Simulation(
        f"toy valley, learning rate {learning_rate:g}", record, np.arange(len(path)), whole,
        dict(zip(labels[:2], losses.T[:2], strict=True)), sharpness, losses, labels, learning_rate, threshold,
        np.array([0, 1, -1]),
    )  # fmt: skip


def write(run: Simulation, path: str, replace: bool) -> None:
    """Write a simulation as a trajectory that `mine`, `cluster --by loss` and `info` read like any other."""
    attributes = {"task": run.title, "state": "complete"}
    with Recorder(path, run.losses_TN.shape[1], labels=run.labels, attributes=attributes, replace=replace) as recorder:
        if run.truth is not None:
            recorder.run.write("samples/truth", run.truth)
        for step, losses in enumerate(run.losses_TN):
            scalars = {"train_loss": float(run.loss[step]), "learning_rate": run.learning_rate}
            recorder.record(step, scalars=scalars, losses=losses)
            recorder.run.append(
                "sharpness", step, eigenvalue=run.sharpness[step : step + 1], residual=np.zeros(1),
                threshold=run.threshold,
            )  # fmt: skip
