"""Every sample's slopes along the Hessian's leading eigenvectors: measured, and kept in the file.

S samples, K eigenvectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis import slopes as analysis
from opsig_cli.backends import Eigenpairs, Session
from opsig_cli.errors import OpsigError
from opsig_cli.studies.curvature import scale_of
from opsig_cli.studies.floor import state_at
from opsig_cli.studies.trained import settings_at, settings_of
from opsig_cli.trajectory.file import Trajectory


@dataclass(frozen=True)
class Slopes:
    """At one checkpoint, or at the floor behind it: eigenvalues (K,), their residuals, the threshold, and of every
    sample slopes and curvatures along each eigenvector (S, K)."""

    step: int
    place: str
    values: np.ndarray
    residuals: np.ndarray
    threshold: float
    slope_SK: np.ndarray
    curvature_SK: np.ndarray
    pairs: Eigenpairs | None = None

    def first(self, count: int) -> Slopes:
        """Those of the first `count` eigenvectors."""
        return Slopes(
            self.step, self.place, self.values[:count], self.residuals[:count], self.threshold,
            self.slope_SK[:, :count], self.curvature_SK[:, :count],
        )  # fmt: skip


def slopes_at(
    run: Trajectory, session: Session, step: int, count: int, tolerance: float, place: str,
    previous: Eigenpairs | None = None,
) -> Slopes:  # fmt: skip
    """Every sample's slopes along the leading eigenvectors of what decides stability, by way of `previous` ones.

    For Adam that is P^-1/2 H P^-1/2, and v stands for P^-1/2 times its eigenvector, so that the curvatures' mean is its
    eigenvalue, too. Raises OpsigError for more eigenvectors than parameters, or where Adam's state is not known.
    """
    stored = settings_of(run)
    settings = None if stored is None else settings_at(run, stored, step)
    state = state_at(run, session, step, place)
    scale = scale_of(settings, state)
    if scale is None and settings is not None and settings.preconditioned:
        raise OpsigError(f"{run.path} holds no state of Adam at step {step}, which its preconditioner takes")
    found: Eigenpairs = session.top_eigenpairs(state, count, tolerance, previous, scale)  # pyright: ignore
    if len(found.values) < count:
        raise OpsigError(f"the model has {len(found.values)} parameters: -k must not be more")
    directions = found.vectors if scale is None else (found.vectors * scale).astype(found.vectors.dtype)
    slope_SK, curvature_SK = session.slopes_along(state, directions)  # pyright: ignore[reportAttributeAccessIssue]
    ids = run.samples
    threshold = np.nan if settings is None else settings.threshold
    return Slopes(
        step, place, found.values, found.residuals, float(threshold), slope_SK[ids], curvature_SK[ids], found
    )  # fmt: skip


def kept(run: Trajectory, step: int, count: int, place: str, every: bool = False) -> Slopes | None:
    """What the file holds of a checkpoint: the first `count` eigenvectors, or with `every` all there are, measured at
    this place; None where it holds fewer, or of another place."""
    if step not in run.steps("slopes") or not run.has("slopes/slope"):
        return None
    if int(run.row("slopes/at_floor", step)) != (place == "floor"):
        return None
    values = run.row("slopes/eigenvalue", step)
    if len(values) < count:
        return None
    slopes, curvatures = run.row("slopes/slope", step), run.row("slopes/curvature", step)
    found = Slopes(
        step, place, values, run.row("slopes/residual", step), float(run.row("slopes/threshold", step)),
        slopes.T.astype(np.float64), curvatures.T.astype(np.float64),
    )  # fmt: skip
    return found if every else found.first(count)


def places_kept(run: Trajectory) -> dict[int, str]:
    """Where the slopes that the file holds were measured, by step."""
    steps = run.steps("slopes").tolist()
    return {step: "floor" if int(run.row("slopes/at_floor", step)) else "iterate" for step in steps}


def steepness(run: Trajectory, first: int, last: int) -> np.ndarray:
    """How steep every sample's loss is, (S,), along the eigenvectors that the file holds from step `first` to `last`.

    Raises OpsigError where it holds none there.
    """
    inside = {step: place for step, place in places_kept(run).items() if first <= step <= last}
    found = [kept(run, step, 1, place, every=True) for step, place in inside.items()]
    rows = [np.nan_to_num(slopes.slope_SK) for slopes in found if slopes is not None]
    if not rows:
        raise OpsigError(
            f"{run.path} holds no slopes along eigenvectors from step {first} to {last}. Run: opsig sharpness "
            f"{run.path} --name"
        )
    return analysis.steepness(analysis.scaled(np.stack(rows)))


def measure(
    run: Trajectory, session: Session, steps: Sequence[int], count: int, tolerance: float, place: str
) -> Iterator[int]:
    """Measure slopes at these checkpoints, append them to the file and commit each; yields the step."""
    previous: Eigenpairs | None = None
    for step in steps:
        found = slopes_at(run, session, step, count, tolerance, place, previous)
        previous = found.pairs
        run.append(
            "slopes", step, at_floor=int(place == "floor"), eigenvalue=found.values, residual=found.residuals,
            threshold=found.threshold, slope=found.slope_SK.T, curvature=found.curvature_SK.T,
        )  # fmt: skip
        run.commit()
        yield step


def check_kept(run: Trajectory, steps: Sequence[int], count: int, place: str) -> tuple[list[int], int]:
    """The checkpoints whose slopes are missing, and how many eigenvectors to measure: as many as at others.

    Raises OpsigError where the file holds slopes of fewer, or of another place.
    """
    for step, where in places_kept(run).items():
        if where != place:
            raise OpsigError(f"{run.path} holds slopes at the {where} of step {step}. Give --at {where}, or --replace")
    held = run.shape("slopes/eigenvalue")[1] if run.has("slopes/eigenvalue") else count
    if held < count:
        raise OpsigError(
            f"{run.path} holds slopes along {held} eigenvectors, not {count}. Give -k {held}, or --replace"
        )
    known = set(run.steps("slopes").tolist())
    return [step for step in steps if step not in known], held
