"""Samples that were not mined and belong to a group: who may, and who does.

S samples of the run, M samples that were grouped, N others, C checkpoints, G groups. Gradients of all samples are the
dear part, so that those who do not look like any group, and those who do not align at the first checkpoint, are not
asked for again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis import grouping
from opsig_cli.analysis.grouping import RESEMBLES, Grouping
from opsig_cli.backends import Session
from opsig_cli.studies.clustering import gathering
from opsig_cli.studies.clustering.clusters import NOBODY, Joined
from opsig_cli.studies.clustering.window import Window
from opsig_cli.trajectory.file import Trajectory


@dataclass(frozen=True)
class Candidates:
    """Positions of samples that may join, (N,), and their mean likeness with every group, (N, G), or None."""

    position: np.ndarray
    likeness_NG: np.ndarray | None


def candidates(
    run: Trajectory, session: Session, position: np.ndarray, sets: list[np.ndarray], window: Window, looks: bool
) -> Candidates:
    """Samples outside of `position` that look like one of the `sets`, as whoever joins must; all where features are
    not known (`looks` False)."""
    outside = np.setdiff1d(np.arange(len(run.samples)), position)
    if not looks or not sets or not len(outside):
        return Candidates(outside, None)
    likeness_NG = gathering.mean_likeness_with(run, session, outside, sets, window)
    alike = (likeness_NG >= RESEMBLES).any(1)
    return Candidates(outside[alike], likeness_NG[alike])


def cosines(
    run: Trajectory, session: Session, steps: np.ndarray, position: np.ndarray, others: Candidates, found: Grouping,
    sets: list[np.ndarray], advance: Callable[..., None],
) -> tuple[np.ndarray, Joined]:  # fmt: skip
    """Mean gradient cosines of the samples at `position` with every group at these checkpoints, (C, M, G), and who
    joins: by the mean over the checkpoints, of those who at the first of them are on their way (see
    `grouping.may_belong`)."""
    if not sets:
        return np.zeros((1, len(position), 0)), NOBODY
    left = np.arange(len(others.position))
    rows_CMG, others_CNG = [], []
    for some in (steps[:1], steps[1:]):
        asked = np.concatenate([position, others.position[left]])
        every = gathering.group_cosines(run, session, some, asked, sets)
        for step, means in zip(some.tolist(), every, strict=True):
            advance(note=f"step {step}")
            rows_CMG.append(means[: len(position)])
            others_CNG.append(means[len(position) :])
            if len(rows_CMG) == 1:
                on_the_way = grouping.may_belong(others_CNG[0], found)
                left, others_CNG = left[on_the_way], [others_CNG[0][on_the_way]]
    likeness_NG = None if others.likeness_NG is None else others.likeness_NG[left]
    group, alignment = grouping.join(np.mean(others_CNG, 0), found, likeness_NG)
    inside = group >= 0
    return np.stack(rows_CMG), Joined(others.position[left][inside], group[inside], alignment[inside])
