"""What becomes of the pairs when they are tried: by silence, and by whose curvature it is that they feel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from opsig_cli.analysis.verdicts import Evidence, asks_for_curvature, judge, speaks
from opsig_cli.backends import Session
from opsig_cli.studies.clustering import curving, silencing
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.pace import paced
from opsig_cli.trajectory.file import Trajectory


def tried(
    run: Trajectory, session: Session, clusters: Clusters, held_out: np.ndarray, test: str, budget: int | None,
    progress: Callable[[str, int], AbstractContextManager[Any]],
) -> silencing.Outcome:  # fmt: skip
    """What becomes of the pairs' swing when they are silent and, of those that silence cannot decide, whose curvature
    their sides feel."""
    outcome = silencing.Outcome({}, {}, [])
    if test == "replay" and clusters.pairs:
        steps = silencing.BUDGET if budget is None else budget
        parts, passes = steps // silencing.LENGTH, silencing.LENGTH + 1
        with progress("replays", parts) as shown, paced(session, shown, parts, passes, together=2) as advance:
            outcome = silencing.silence(run, session, clusters, held_out, steps, advance)
    if test == "none":
        return outcome
    known = _known_of_all(clusters, outcome)
    speaking = [number for number, found in known.items() if speaks(found)]
    swinging = any(judge(found)[0] == "established" for found in known.values())
    asked = {number for number in speaking if asks_for_curvature(known[number], swinging)}
    parts = len(held_out) if asked else 0
    with progress("curvature", parts) as shown, paced(session, shown, parts, 2 * len(asked)) as advance:
        outcome.curved = curving.curvature_left(run, session, clusters, asked, held_out, advance, aside=speaking)
    outcome.aside = {number: curving.others_than(clusters, number, speaking) for number in outcome.curved}
    return outcome


def _known_of_all(clusters: Clusters, outcome: silencing.Outcome) -> dict[int, Evidence]:
    """What is known of every pair, by its number from 0, of which all could be measured."""
    known = ((number, _known(clusters, number, outcome)) for number in range(len(clusters.pairs)))
    return {number: found for number, found in known if found is not None}


def _known(clusters: Clusters, number: int, outcome: silencing.Outcome) -> Evidence | None:
    """What is known of a pair, None where a part of it could not be measured."""
    pair = clusters.pairs[number]
    if not np.isfinite([pair.cohesion, pair.opposition, pair.loss_correlation]).all():
        return None
    return Evidence(
        pair.opposition, pair.interval[1], pair.p_value, pair.alike, tuple(outcome.silenced.get(number, ())),
        outcome.untested.get(number, ""), labelled=clusters.labelled,
        curved=tuple(outcome.curved.get(number, ())), at_ends=clusters.by == "slope",
    )  # fmt: skip


def _shown(clusters: Clusters, outcome: silencing.Outcome, number: int) -> tuple[int, ...]:
    """The numbers, as records have them, of the pairs that were set aside for one."""
    shown = clusters.numbers()
    return tuple(sorted(shown[other] for other in outcome.aside.get(number, ())))


def judged(clusters: Clusters, outcome: silencing.Outcome, test: str) -> Clusters:
    """The clusters with the verdict on every pair."""
    pairs = []
    for number, pair in enumerate(clusters.pairs):
        if test == "none":
            verdict, reason = "unclear", "it was not tested (--test none)"
        elif clusters.by == "loss":
            verdict, reason = "unclear", "losses alone do not show whether the sides share a feature"
        elif (known := _known(clusters, number, outcome)) is None:
            verdict, reason = "unclear", "a part of its evidence could not be measured, as where losses do not move"
        else:
            verdict, reason = judge(known)
            aside = _shown(clusters, outcome, number)
            pair = replace(pair, silenced=tuple(known.silenced), curved=tuple(known.curved), aside=aside)
        pairs.append(replace(pair, verdict=verdict, reason=reason))
    tests = replace(
        clusters.tests, replayed=sorted(outcome.steps), replays=outcome.replays,
        replayed_steps=outcome.replays * silencing.LENGTH,
    )  # fmt: skip
    return replace(clusters, pairs=pairs, tests=tests)
