"""The theory's runs: what they record, and writing them as trajectories. T points of time, N samples, P parameters."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.analysis import linear_descent, linear_model
from opsig_cli.analysis import valley as toy
from opsig_cli.backends import Tensor
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.trajectory.recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DYNAMICS = ("flow", "gd", "sampled")
LOSSES = ("square", "cross-entropy")
FLOW_POINTS = 400


@dataclass(frozen=True)
class Simulation:
    """One simulated run: its record, and over time (T,) the loss, the groups' losses, and the sharpness.

    `losses_TN` are of the samples, on `side` (N,): +1 and -1 of the two opposing groups, 0 of the rest. `names`: of the
    sides +1, -1 and 0. `params_TP` and `eigenvectors_TP` are laid out as `layout` says. `settings`: under which the
    built-in task measures the same run; `state(time)`: the coordinates at a time, or ValueError.
    `landscape(u, v)`: losses of the two sides and their average across the toy valley.
    """

    title: str
    record: Mapping[str, Any]
    times: np.ndarray
    loss: np.ndarray
    groups: Mapping[str, np.ndarray]
    sharpness: np.ndarray
    losses_TN: np.ndarray
    side: np.ndarray
    names: tuple[str, str, str]
    params_TP: np.ndarray
    eigenvectors_TP: np.ndarray
    layout: Sequence[Tensor]
    settings: Settings
    state: Callable[[float], Mapping[str, Any]]
    landscape: Callable[[np.ndarray, float], Mapping[str, np.ndarray]] | None = None

    @property
    def threshold(self) -> float:
        """The sharpness at which descent loses stability, 2 / eta; infinite for gradient flow."""
        return self.settings.threshold


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
    if loss != "square" and dynamics != "sampled":
        raise UsageError(f"--loss {loss} needs --dynamics sampled")
    try:
        problem = linear_model.Problem(d1, d2, alpha, beta_norm)
    except ValueError as error:
        raise UsageError(str(error)) from error
    flow = linear_model.gradient_flow(problem)
    about = {"dynamics": dynamics, "d1": d1, "d2": d2, "alpha": alpha, "beta_norm": beta_norm}
    theory = linear_model.summarise_flow(flow)
    task = f"linear-model:d1={d1},d2={d2},alpha={alpha!r},beta_norm={beta_norm!r}"
    if dynamics == "flow":
        record = about | {"learning_rate": None} | theory | {"crossing_step": None, "peak_feature": None}
        return _flow(flow, record, task)
    side = linear_descent.sides(linear_descent.PROBABILITY)
    if dynamics == "gd":
        found = linear_descent.population_descent(problem, learning_rate, steps)
    else:
        drawn = linear_descent.draw(problem, linear_descent.SAMPLES, linear_descent.PROBABILITY, seed)
        found = linear_descent.sampled_descent(problem, learning_rate, steps, drawn, loss)
        side = drawn.side
        about |= {"loss": loss, "seed": seed}
        task += f",samples={linear_descent.SAMPLES},loss={loss},seed={seed}"
    summary = linear_descent.summarise_descent(found, learning_rate)

    def state(time: float) -> dict[str, Any]:
        t = _step(time, len(found.loss))
        rows = {"epsilon": found.epsilon, "delta": found.delta, "q": found.q, "c": found.c}
        rows |= {"loss": found.loss, "sharpness": found.sharpness}
        return {"step": t} | {name: float(row[t]) for name, row in rows.items()}

    names = ("outlier +", "outlier -", "other")
    return Simulation(
        title=f"{_title(problem, dynamics)}, learning rate {learning_rate:g}",
        record=about | {"learning_rate": learning_rate} | theory | summary,
        times=np.arange(len(found.loss)),
        loss=found.loss,
        groups=_means(found.losses_TN, side, names),
        sharpness=found.sharpness,
        losses_TN=found.losses_TN,
        side=side,
        names=names,
        params_TP=found.params_TP,
        eigenvectors_TP=found.eigenvectors_TP,
        layout=_layout({"b": (d1,), "b_o": (d2,), "c": ()}),
        settings=_settings(task, learning_rate, len(found.loss) - 1),
        state=state,
    )


def _flow(flow: linear_model.Flow, record: Mapping[str, Any], task: str) -> Simulation:
    problem = flow.problem
    times = np.linspace(0, flow.end, FLOW_POINTS)
    rows = np.array([flow.at(time) for time in times])
    side = linear_descent.sides(linear_descent.PROBABILITY)
    losses = np.array([problem.group_losses(*flow.at(time), linear_descent.PROBABILITY) for time in times])
    curvatures = [problem.curvature(*row) for row in rows]
    names = ("outlier +", "outlier -", "other")

    def state(time: float) -> dict[str, Any]:
        if not 0 <= time <= flow.end:
            raise ValueError(f"{time:g} is not a time from 0 to {flow.end:g}")
        epsilon, delta, ln_o, c = map(float, flow.state(time))
        found = {"time": time, "epsilon": epsilon, "delta": delta, "ln_o": ln_o, "c": c}
        return found | {"loss": flow.loss(time), "sharpness": flow.sharpness(time)}

    return Simulation(
        title=_title(problem, "gradient flow"),
        record=record,
        times=times,
        loss=np.array([problem.loss(*row) for row in rows]),
        groups={},
        sharpness=np.array([value for value, _ in curvatures]),
        losses_TN=losses[:, np.select([side == 1, side == -1], [0, 1], 2)],
        side=side,
        names=names,
        params_TP=problem.embed(*rows.T),
        eigenvectors_TP=problem.embed(*np.array([vector for _, vector in curvatures]).T),
        layout=_layout({"b": (problem.d1,), "b_o": (problem.d2,), "c": ()}),
        settings=_settings(task, times[1], len(times) - 1, "flow"),
        state=state,
    )


def valley(learning_rate: float, steps: int) -> Simulation:
    """Gradient descent in the toy valley from (u, v) = (1, 0.1)."""
    place = toy.Valley()
    path = toy.descend(place, learning_rate, steps)
    losses = np.array([place.losses(u, v) for u, v in path])
    whole = np.array([place.loss(u, v) for u, v in path])
    curvatures = [place.curvature(u, v) for u, v in path]
    sharpness = np.array([value for value, _ in curvatures])
    settings = _settings("valley", learning_rate, len(path) - 1)
    crossed = np.flatnonzero(sharpness >= settings.threshold)
    names = ("plane", "other", "all others")
    record = {
        "learning_rate": learning_rate,
        "steps": len(path) - 1,
        "threshold": settings.threshold,
        "crossing_step": int(crossed[0]) if len(crossed) else None,
        "peak_step": int(whole[10:].argmax()) + 10 if len(whole) > 10 else None,
        "diverged_at": len(path) if len(path) <= steps else None,
        "u": path[:, 0],
        "v": path[:, 1],
        "loss": whole,
        "sharpness": sharpness,
    }

    def state(time: float) -> dict[str, Any]:
        t = _step(time, len(path))
        plane, other, _ = losses[t].tolist()
        found = {"step": t, "u": float(path[t, 0]), "v": float(path[t, 1]), "loss_plane": plane, "loss_other": other}
        return found | {"loss": float(whole[t]), "sharpness": float(sharpness[t])}

    def landscape(u: np.ndarray, v: float) -> dict[str, np.ndarray]:
        plane, other, _ = place.losses(u, v)
        return {"plane": plane, "other": other, "average": (plane + other) / 2}

    side = linear_descent.sides(place.probability)
    return Simulation(
        title=f"toy valley, learning rate {learning_rate:g}",
        record=record,
        times=np.arange(len(path)),
        loss=whole,
        groups=dict(zip(names[:2], losses.T[:2], strict=True)),
        sharpness=sharpness,
        losses_TN=losses[:, np.select([side == 1, side == -1], [0, 1], 2)],
        side=side,
        names=names,
        params_TP=path,
        eigenvectors_TP=np.array([vector for _, vector in curvatures]),
        layout=_layout({"u": (), "v": ()}),
        settings=settings,
        state=state,
        landscape=landscape,
    )


def states(run: Simulation, times: Sequence[float]) -> list[dict[str, Any]]:
    """The coordinates, the loss and the sharpness at points of time, one record each. Raises UsageError for others."""
    try:
        return [{"kind": "state", **run.state(time)} for time in times]
    except ValueError as error:
        raise UsageError(f"--at: {error}") from error


def write(run: Simulation, path: str, replace: bool) -> None:
    """Write a simulation as a trajectory that all commands read like any other.

    Every point of time is a step. For gradient flow, the time from one to the next is the learning rate.
    """
    if os.path.exists(path) and not replace:
        raise OpsigError(f"{path} exists. Overwrite it with --replace")
    labels = [run.names[[1, -1, 0].index(int(side))] for side in run.side]
    attributes = {
        "opsig_version": version("opsig"), "command": shlex.join(["opsig", *sys.argv[1:]]), "title": run.title,
        "task": run.settings.task, "settings_json": run.settings.stored_form(), "state": "complete",
    }  # fmt: skip
    rate = run.settings.learning_rate
    shares = [
        np.square(run.eigenvectors_TP[:, tensor.offset : tensor.offset + tensor.size]).sum(1) for tensor in run.layout
    ]
    with Recorder(
        path, len(run.side), labels=labels, layout=run.layout, attributes=attributes, replace=replace
    ) as recorder:
        recorder.run.write("samples/truth", np.select([run.side == 1, run.side == -1], [0, 1], -1))
        for step, losses in enumerate(run.losses_TN):
            recorder.run.append("scalars", step, train_loss=float(run.loss[step]), learning_rate=rate)
            recorder.run.append("losses", step, loss=losses)
            recorder.run.append("checkpoints", step, params=run.params_TP[step].astype(np.float32))
            recorder.run.append(
                "sharpness", step, eigenvalue=run.sharpness[step : step + 1], residual=np.zeros(1),
                threshold=run.threshold, eigenvector=run.eigenvectors_TP[step].astype(np.float32),
                layer_fraction=np.array([share[step] for share in shares]),
            )  # fmt: skip
        recorder.run.commit()


def draw(run: Simulation) -> Figure:
    """The picture: the paper's Fig. 4 for the valley, the right of its Fig. 38 for the linear model."""
    from opsig_cli.figures import simulated

    over_time = (run.loss, run.groups, run.sharpness, run.threshold)
    first, last = run.times[0], run.times[-1]
    title = f"{run.title}, {'steps' if run.groups else 'time'} {first:g} to {last:g}: losses and sharpness"
    place = toy.Valley()
    part = place.probability
    whole = (
        f"whole loss: {part:g} x the average of the two sides, (1 - {place.scale:g} u v)^2 / 2 and "
        f"(1 + {place.scale:g} u v)^2 / 2, + {1 - part:g} x (v - {place.target:g})^2 / 2 of all others"
    )
    if run.landscape is not None:
        return simulated.valley_page(run.params_TP, *over_time, run.landscape, title, whole)
    return simulated.simulation_page(run.times, *over_time, title)


def _step(time: float, count: int) -> int:
    if not (0 <= time < count and time == int(time)):
        raise ValueError(f"{time:g} is not a step from 0 to {count - 1}")
    return int(time)


def _means(losses_TN: np.ndarray, side: np.ndarray, names: tuple[str, str, str]) -> dict[str, np.ndarray]:
    return {name: losses_TN[:, side == s].mean(1) for name, s in zip(names, (1, -1, 0), strict=True)}


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    found, offset = [], 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found.append(Tensor(name, "parameter", shape, offset, size))
        offset += size
    return found


def _settings(task: str, learning_rate: float, steps: int, optimizer: str = "gd") -> Settings:
    given = {"task": task, "optimizer": optimizer, "learning_rate": float(learning_rate), "steps": steps}
    return Settings.of(given | {"track_every": 1, "checkpoint_every": 1})


def _title(problem: linear_model.Problem, dynamics: str) -> str:
    sizes = f"d1 {problem.d1}, d2 {problem.d2}, alpha {problem.alpha:g}, |beta| {problem.beta_norm:g}"
    return f"two-layer linear model, {dynamics}: {sizes}"
