"""Grouping by slopes along leading eigenvectors, and the eigenvectors that pairs lie on.

S samples of the run, M samples that are grouped, C checkpoints, K eigenvectors, G groups. A sample's coordinates are
K numbers a checkpoint, whatever the number of parameters: see `analysis.slopes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis import slopes as analysis
from opsig_cli.analysis.gram import Similarity
from opsig_cli.backends import Session
from opsig_cli.studies.clustering.clusters import Clusters, OnVectors
from opsig_cli.studies.clustering.window import Window, checkpoints_in
from opsig_cli.studies.floor import choose_place, why_no_floor
from opsig_cli.studies.slopes import Slopes, kept, places_kept, slopes_at
from opsig_cli.trajectory.file import Trajectory

COUNT = 16
"""K: eigenvectors that are measured; how many of them count is found."""
TOLERANCE = 1e-2
"""Residual of their eigenpairs: what a vector lacks lies in its neighbours, which are measured, too."""


@dataclass
class Coordinates:
    """All samples' slopes at several checkpoints, and the number of leading vectors that are compared, which is found
    when the samples to group are known."""

    measured: list[Slopes]
    count: int = 1
    scaled_CSK: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scaled_CSK = analysis.scaled(np.stack([slopes.slope_SK for slopes in self.measured]))

    def widened(self, position: np.ndarray) -> np.ndarray:
        """The positions, and as many samples with the largest slopes."""
        largest = np.argsort(-analysis.steepness(self.scaled_CSK), kind="stable")[: len(position)]
        return np.concatenate([position, largest[~np.isin(largest, position)]])

    def similarity(self, position: np.ndarray, smallest: int) -> Similarity:
        """Mean cosines of these samples' coordinates, (M, M) float32, over as many vectors as show structure."""
        chosen = self.scaled_CSK[:, position]
        self.count = analysis.choose_count(analysis.structure(chosen, smallest))
        return analysis.similarity(analysis.coordinates(chosen, self.count))

    @property
    def note(self) -> str:
        """What was compared, in words."""
        steps = ", ".join(str(slopes.step) for slopes in self.measured)
        where = "at the floor of the valley " if self.measured[0].place == "floor" else ""
        whole = self.scaled_CSK.shape[2]
        if self.count == whole:
            return f"slopes along {whole} leading eigenvectors {where}are compared, at steps {steps}"
        return (
            f"slopes along the first {self.count} of {whole} eigenvectors {where}are compared, at steps {steps}: with "
            "more, groups stand out less from what there is by chance"
        )


def checkpoints_of(run: Trajectory, window: Window) -> list[int]:
    """The checkpoints whose slopes are measured: every other one of those whose gradients would be compared."""
    steps = checkpoints_in(run, window).tolist()
    return steps[1::2] if len(steps) > 3 else steps


def gather(
    run: Trajectory, session: Session, backend: str | None, window: Window, warn: Callable[[str], None],
    advance: Callable[..., None],
) -> Coordinates:  # fmt: skip
    """Measure every sample's slopes at the checkpoints of the window, or take them from the file where it has them."""
    backends.require(session, backends.Curvature, backend, "eigenvectors")
    backends.require(session, backends.Slopes, backend, "slopes")
    steps = checkpoints_of(run, window)
    place, words = choose_place(run, session, steps, None)
    if words:
        warn(words.partition(" (")[0])  # cluster has no --at
    elif place == "iterate" and (why := why_no_floor(run, steps[-1])):
        warn(f"note: slopes are measured at the iterates, as {run.path} has no floor: {why}")
    parameters = sum(tensor.size for tensor in session.layout if tensor.kind == "parameter")
    count = min(COUNT, parameters)
    measured, previous = [], None
    for step in steps:
        found = kept(run, step, count, place) or slopes_at(run, session, step, count, TOLERANCE, place, previous)
        previous = found.pairs
        measured.append(replace(found, pairs=None))
        advance(note=f"step {step}")
    return Coordinates(measured)


def kept_near(run: Trajectory, window: Window) -> Slopes | None:
    """Slopes that the file holds of the last checkpoint in the window, None where it holds none there."""
    first, last = int(window.steps_T[0]), int(window.steps_T[-1])
    inside = {step: place for step, place in places_kept(run).items() if first <= step <= last}
    return kept(run, max(inside), 1, inside[max(inside)], every=True) if inside else None


def with_vectors(clusters: Clusters, slopes: Slopes | None) -> Clusters:
    """The clusters with the eigenvectors that each pair lies on, members that joined counted with their groups."""
    if slopes is None:
        return clusters
    found = clusters.grouping
    sides = [
        np.concatenate([clusters.position[found.members(g)], clusters.joined.position[clusters.joined.group == g]])
        for g in range(len(found.partner_G))
    ]
    lying = [analysis.lies_on(slopes.slope_SK, slopes.curvature_SK, (sides[a], sides[b])) for a, b in found.pairs()]
    return replace(clusters, on_vectors=OnVectors(slopes.step, slopes.place, slopes.values, slopes.threshold, lying))
