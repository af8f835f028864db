"""Curvature along a trajectory: which checkpoints, for which samples, measured and appended. T steps, S samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.backends import Eigenpairs, SampleLosses, Session, State, targets_of
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.settings import Settings
from opsig_cli.studies.critical import critical_sharpness
from opsig_cli.studies.floor import state_at
from opsig_cli.studies.trained import other_loss, settings_at, settings_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state

SAMPLE_METRICS = ("gradient_norm", "curvature", "sample_sharpness")
STEP_METRICS = ("trace", "critical_sharpness")
SLICE_POINTS = 41
GROUPS = {
    (False, "iterate"): "sharpness", (True, "iterate"): "preconditioned",
    (False, "floor"): "floor", (True, "floor"): "preconditioned_floor",
}  # fmt: skip
"""The row group by whether the Hessian is preconditioned, and by place."""
PLACE = {group: place for (_, place), group in GROUPS.items()}
PRECONDITIONED = {group: preconditioned for (preconditioned, _), group in GROUPS.items()}


def select_steps(run: Trajectory, text: str | None) -> list[int]:
    """Steps of checkpoints, all or those of `A:B:C`: A to B, both included, every C-th; or one step.

    Raises OpsigError where the run has none there, or one of them is damaged.
    """
    run.require("checkpoints/params")
    steps = run.steps("checkpoints").tolist()
    if not steps:
        raise OpsigError(f"{run.path} has no checkpoint that can be used")
    chosen = steps if text is None else _chosen(run, steps, text)
    run.check("checkpoints", chosen)
    run.check("scalars", np.intersect1d(chosen, run.steps("scalars")).tolist())  # see `settings_at`
    return chosen


def few_words(run: Trajectory, text: str | None, chosen: list[int]) -> str | None:
    """What to say where the C of `A:B:C`, a number of checkpoints and not of steps, leaves one of several."""
    first, _, rest = (text or "").partition(":")
    last, _, every = rest.partition(":")
    if not every or len(chosen) != 1:
        return None
    between = len(_chosen(run, run.steps("checkpoints").tolist(), f"{first}:{last}")) if first or last else 2
    if between == 1:
        return None
    return f"note: --steps {text} takes every {every}th checkpoint, which is 1 of {between}. In steps: --steps A:B"


def _chosen(run: Trajectory, steps: list[int], text: str) -> list[int]:
    parts = text.split(":")
    if len(parts) > 3 or not all(part.isdigit() or not part for part in parts) or not any(parts):
        raise UsageError(f"--steps '{text}' is not a range of steps. Write A:B, A:B:C or one step")
    first, last = parts[0], parts[1] if len(parts) > 1 else parts[0]
    if len(parts) > 2 and parts[2] and int(parts[2]) == 0:
        raise UsageError(f"--steps '{text}' takes every 0th checkpoint. Write A:B:C with C from 1 on")
    if first and last and int(first) > int(last):
        raise UsageError(f"--steps '{text}' ends before it begins")
    chosen = [step for step in steps if (not first or step >= int(first)) and (not last or step <= int(last))]
    chosen = chosen[:: int(parts[2]) if len(parts) > 2 and parts[2] else 1]
    if not chosen:
        raise OpsigError(f"{run.path} has no checkpoint at --steps {text}. {_nearest(steps, first, last)}")
    return chosen


def _nearest(steps: list[int], first: str, last: str) -> str:
    """The checkpoints next to a range that holds none, in words."""
    if not steps:
        return "It has none at all"
    before = [step for step in steps if step < int(first or 0)][-1:]
    after = [step for step in steps if last and step > int(last)][:1]
    return f"Nearest: {', '.join(map(str, before + after))}, of {len(steps)} from {steps[0]} to {steps[-1]}"


def group_of(settings: Settings | None, place: str = "iterate") -> str:
    """The row group of what decides stability, `preconditioned` for Adam, at the iterates or at the floor."""
    return GROUPS[settings is not None and settings.preconditioned, place]


def held_group(run: Trajectory) -> str | None:
    """The row group that says how stable a run is: the one with more steps, the floor's of two; None without any."""
    settings = settings_of(run)
    wanted = [group_of(settings, "floor"), group_of(settings)]
    have = [group for group in wanted if run.has(f"{group}/eigenvalue") and len(run.steps(group))]
    return max(have, key=lambda group: len(run.steps(group)), default=None)


def scale_of(settings: Settings | None, state: State) -> np.ndarray | None:
    """P^-1/2 of Adam's preconditioner P = (1 - beta1^t) diag(sqrt(v / (1 - beta2^t)) + epsilon), (P,) float64.

    None for other optimizers, and before the first step, where there is no second moment. (Cohen et al. 2022,
    arXiv 2207.14484.)
    """
    second = state.optimizer.get("exp_avg_sq")
    if settings is None or not settings.preconditioned or second is None or state.step == settings.began:
        return None
    count = state.step - settings.began
    corrected = np.sqrt(second.astype(np.float64) / (1 - settings.beta2**count)) + settings.epsilon
    return 1 / np.sqrt((1 - settings.beta1**count) * corrected)


def count_to_measure(run: Trajectory, group: str, count: int) -> int:
    """How many eigenvalues a step to measure for `count` of them: as many as the file holds at others.

    Raises OpsigError where it holds fewer.
    """
    held = run.shape(f"{group}/eigenvalue")[1] if run.has(f"{group}/eigenvalue") else count
    if held < count:
        raise OpsigError(f"{run.path} holds {held} eigenvalues a step, not {count}. Give -k {held}, or --replace")
    return held


def to_measure(
    run: Trajectory, group: str, steps: Sequence[int], count: int, tolerance: float
) -> tuple[list[int], int]:
    """The steps that lack their first `count` eigenvalues or hold them to a residual above the tolerance, and how many
    of them are of the latter."""
    have = run.steps(group).tolist()
    residuals = run.rows(f"{group}/residual", 0, len(have))[:, :count] if have else np.empty((0, count))
    met: dict[int, bool] = dict(zip(have, np.all(residuals <= tolerance, axis=1).tolist(), strict=True))
    return [step for step in steps if not met.get(step)], sum(not met.get(step, True) for step in steps)


def measure(
    run: Trajectory, session: Session, group: str, steps: Sequence[int], count: int, tolerance: float
) -> Iterator[int]:
    """Write the `count` top eigenpairs at these checkpoints, where the group says, and commit each; yields the step.

    A checkpoint of Adam's before its first step has no preconditioner and is passed over.
    """
    settings = settings_of(run)
    previous: Eigenpairs | None = None
    for step in steps:
        state = state_at(run, session, step, PLACE[group])
        here = None if settings is None else settings_at(run, settings, step)
        scale = scale_of(here, state) if PRECONDITIONED[group] else None
        if PRECONDITIONED[group] and scale is None:
            continue
        found: Eigenpairs = session.top_eigenpairs(state, count, tolerance, previous, scale)  # pyright: ignore
        if len(found.values) < count:
            raise OpsigError(f"the model has {len(found.values)} parameters: -k must not be more")
        previous = found
        columns: dict[str, Any] = {
            "eigenvalue": found.values, "residual": found.residuals, "products": found.products,
            "threshold": np.nan if here is None else here.threshold,
        }  # fmt: skip
        if not PRECONDITIONED[group]:
            columns |= {"eigenvector": found.vectors[0], "layer_fraction": layer_fractions(session, found.vectors[0])}
        if step in run.steps(group):
            run.rewrite(group, step, **columns)
        else:
            run.append(group, step, **columns)
        run.commit()
        yield step


def layer_fractions(session: Session, vector: np.ndarray) -> np.ndarray:
    """Share of each tensor in the squared norm of a (P,) vector (the paper's appendix D); NaN for buffers."""
    squares = np.square(vector.astype(np.float64))
    shares = [
        squares[t.offset : t.offset + t.size].sum() / squares.sum() if t.kind == "parameter" else np.nan
        for t in session.layout
    ]
    return np.array(shares)


def records(
    run: Trajectory, group: str, steps: Sequence[int], tolerance: float, count: int | None = None
) -> list[dict[str, Any]]:
    """What the file holds of these steps, one record an eigenvalue, at most the largest `count` of each."""
    known = set(run.steps(group).tolist())
    names = run.read("layout/name").tolist() if run.has("layout/name") else []
    found = []
    for step in (step for step in steps if step in known):
        values, residuals = run.row(f"{group}/eigenvalue", step), run.row(f"{group}/residual", step)
        products = int(run.row(f"{group}/products", step)) if run.has(f"{group}/products") else None
        threshold = float(run.row(f"{group}/threshold", step)) if run.has(f"{group}/threshold") else None
        fractions = run.row(f"{group}/layer_fraction", step) if run.has(f"{group}/layer_fraction") else []
        shares = {n: float(f) for n, f in zip(names, fractions, strict=False) if np.isfinite(f)}
        for rank, (value, residual) in enumerate(
            zip(values[:count].tolist(), residuals[:count].tolist(), strict=True), 1
        ):
            record = {
                "trajectory": run.path, "step": step, "rank": rank, "eigenvalue": value, "residual": residual,
                "products": None if products == -1 else products, "converged": residual <= tolerance,
                "threshold": threshold, "preconditioned": PRECONDITIONED[group], "at": PLACE[group],
            }  # fmt: skip
            found.append(record | ({"layer_fraction": shares} if rank == 1 and shares else {}))
    return found


def direction_at(run: Trajectory, session: Session, step: int, state: State) -> np.ndarray:
    """The top eigenvector of the plain Hessian at a checkpoint, (P,): the file's, or measured now."""
    if step in run.steps("sharpness") and run.has("sharpness/eigenvector"):
        vector = run.row("sharpness/eigenvector", step)
        if np.isfinite(vector).all():
            return vector
    return session.top_eigenpairs(state, 1, 1e-3).vectors[0]  # pyright: ignore


def sample_records(
    run: Trajectory, session: Session, steps: Sequence[int], chosen: dict[str, np.ndarray], metrics: Sequence[str],
    tolerance: float, advance: Callable[..., None], keep: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Metrics of chosen samples (positions by the name of their set) at checkpoints, one record a sample and step.

    `gradient_norm`: of the sample's loss; `curvature`: v'H(z)v along the whole loss's top eigenvector v;
    `sample_sharpness`: the most positive eigenvalue a of H(z), with `sample_sharpness_residual`, |H(z)u - au| over the
    largest size of an eigenvalue. (The paper's Fig. 2.) What the file has of them is taken from it, and with `keep`
    what is measured is put into it.
    """
    ids = run.samples
    everybody = np.unique(np.concatenate(list(chosen.values())))
    found = []
    for step in steps:
        measured = _kept(run, step, metrics, everybody, tolerance)
        lacking = [metric for metric in metrics if metric not in measured]
        if lacking:
            measured |= _measured(run, session, step, lacking, everybody, tolerance)
            if keep:
                put = run.rewrite if step in run.steps("per_sample") else run.append
                put("per_sample", step, **measured)
                run.commit()
        for name, position in chosen.items():
            for place in position.tolist():
                record = {"trajectory": run.path, "step": step, "sample": int(ids[place]), "set": name}
                found.append(record | {metric: float(values[place]) for metric, values in measured.items()})
        advance(note=f"step {step}")
    return found


def _kept(
    run: Trajectory, step: int, metrics: Sequence[str], positions: np.ndarray, tolerance: float
) -> dict[str, np.ndarray]:
    """Rows (S,) of those metrics that the file has of all these samples, sharpness to the tolerance."""
    if step not in run.steps("per_sample"):
        return {}
    found = {}
    for metric in metrics:
        names = [metric] + (["sample_sharpness_residual"] if metric == "sample_sharpness" else [])
        rows = [run.row(f"per_sample/{name}", step) for name in names if run.has(f"per_sample/{name}")]
        known = len(rows) == len(names) and np.isfinite([row[positions] for row in rows]).all()
        if known and (len(rows) == 1 or (rows[1][positions] <= tolerance).all()):
            found |= dict(zip(names, rows, strict=True))
    return found


def _measured(
    run: Trajectory, session: Session, step: int, metrics: Sequence[str], positions: np.ndarray, tolerance: float
) -> dict[str, np.ndarray]:
    """Rows (S,) of these metrics, measured of these samples; of the others NaN, or what came along."""
    ids, state = run.samples, read_state(run, step)
    found: dict[str, np.ndarray] = {}
    if "gradient_norm" in metrics:
        found["gradient_norm"] = session.gradient_norms(state)[ids]  # pyright: ignore
    if "curvature" in metrics:
        direction = direction_at(run, session, step, state)
        found["curvature"] = session.curvature_along(state, direction)[2][ids]  # pyright: ignore
    if "sample_sharpness" in metrics:
        rows = np.full((2, len(ids)), np.nan)
        rows[:, positions] = _sample_sharpness(session, state, ids[positions], tolerance)
        found |= {"sample_sharpness": rows[0], "sample_sharpness_residual": rows[1]}
    return found


def _sample_sharpness(
    session: Session, state: State, samples: np.ndarray, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's most positive Hessian eigenvalue and its residual, (M,); NaN where its loss is not finite."""
    finite = np.ones(len(samples), bool)
    if isinstance(session, SampleLosses):
        finite = np.isfinite(session.sample_losses(state, samples))
    found = np.full((2, len(samples)), np.nan)
    if finite.any():
        found[:, finite] = session.sample_sharpness(state, samples[finite], tolerance)  # pyright: ignore
    return found[0], found[1]


def step_records(
    run: Trajectory, session: Session, steps: Sequence[int], metrics: Sequence[str], advance: Callable[..., None],
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Cheap measures of the whole loss's curvature at checkpoints, one record a step.

    `threshold`: 2 over the learning rate, which critical sharpness stays below while updates lower the loss; None where
    the update is not known.
    """
    settings = settings_of(run)
    other = other_loss(run, settings)
    followed = None if other else settings  # the update goes by the gradient of another loss
    found, unknown = [], []
    for step in steps:
        state = read_state(run, step)
        record: dict[str, Any] = {"trajectory": run.path, "step": step}
        if "trace" in metrics:
            backends.require(session, backends.SpectralDensity, None, "spectral_density")
            nodes, weights, error = session.spectral_density(state)  # pyright: ignore
            record |= {"trace": float(nodes.ravel() @ weights.ravel()), "trace_error": error}
            record |= {"density_nodes": nodes.ravel(), "density_weights": weights.ravel()}
        if "critical_sharpness" in metrics:
            here = settings_at(run, followed, step) if followed else None
            record["critical_sharpness"], known = critical_sharpness(session, state, here)
            rate = settings_at(run, settings, step).learning_rate if settings else 0.0
            record["threshold"] = 2 / rate if rate and known else None
            unknown += [] if known else [step]
        found.append(record)
        advance(note=f"step {step}")
    if unknown:
        lacks = "does not say how it was trained" if settings is None else "does not hold the optimizer's update"
        lacks = f"minimises {other}" if other else lacks
        warn(f"note: {run.path} {lacks}: critical sharpness is along the negative gradient at {len(unknown)} steps")
    return found


def slice_records(
    run: Trajectory, session: Session, step: int, span: float, groups: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Mean losses of groups and of all samples along the top eigenvector through a checkpoint (the paper's Fig. 4).

    `groups`: positions by name; `span`: how far to go each way, in units of the parameters.
    """
    state = read_state(run, step)
    direction = direction_at(run, session, step, state)
    found, counts = [], targets_of(session)[run.samples]
    for position in np.linspace(-span, span, SLICE_POINTS):
        moved = replace(state, params=(state.params + position * direction).astype(np.float32))
        losses = session.losses([moved])[0][0][run.samples].astype(np.float64)
        means = {"all samples": losses[counts].mean()} | {name: losses[p].mean() for name, p in groups.items()}
        found.append({"trajectory": run.path, "step": step, "position": float(position), "losses": means})
    return found
