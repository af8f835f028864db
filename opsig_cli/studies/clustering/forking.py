"""Where to branch a run to see what it is without its strongest pair: a checkpoint, and for how many steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.studies.clustering.records import by_strength
from opsig_cli.studies.filled import targets_of
from opsig_cli.studies.trained import settings_of
from opsig_cli.trajectory.file import Trajectory

if TYPE_CHECKING:
    from opsig_cli.studies.clustering.finding import Found

Record = Mapping[str, Any]


def alternates_from(run: Trajectory, found: Found) -> int | None:
    """The step from which on losses alternate at period two, None where they do not."""
    begin = found.movers.movement.first_alternation
    return None if begin is None else int(run.steps("losses")[found.movers.first + begin])


def fork_of(run: Trajectory, found: Found, records: Sequence[Record]) -> tuple[int, int] | None:
    """A checkpoint, and a number of steps from it on, in which the loss of all but the strongest pair's samples rises
    most, or the pair swings where it never rises; None where the run cannot be trained on."""
    pairs = by_strength(record for record in records if record["kind"] == "pair")
    settings = settings_of(run)
    if not pairs or settings is None or not run.has("checkpoints/params") or not settings.task or settings.untold():
        return None
    swings = _rise_of_others(run, found, pairs[0]) or pairs[0]["apart_step"] or pairs[0]["rise_step"]
    before = [step for step in run.steps("checkpoints").tolist() if step < swings]
    return None if not before else (before[-1], max(20, swings - before[-1] + 10))


def _rise_of_others(run: Trajectory, found: Found, pair: Record) -> int | None:
    """The step of the window at which the loss of all but a pair's samples rises most, None where it never does."""
    clusters, first = found.clusters, found.clusters.window.first - found.movers.first
    steps_T = clusters.window.steps_T
    mean_T = found.movers.movement.mean_T[first : first + len(steps_T)]
    inside = np.isin(clusters.grouping.group_M, [group - 1 for group in pair["groups"]])
    if clusters.losses_TM.shape[0] != len(steps_T) or len(mean_T) != len(steps_T):  # of sightings
        return None
    others_T = mean_T * targets_of(run).sum() - clusters.losses_TM[:, inside].sum(1, dtype=np.float64)
    rises = np.nan_to_num(np.diff(others_T), nan=-np.inf)
    return int(steps_T[rises.argmax() + 1]) if len(rises) and rises.max() > 0 else None
