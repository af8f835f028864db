"""Whether a pair makes the curvature that it feels: what is left of it along the sides' gradients without the pair's
samples, over what is left without as many others of the same labels. It needs no swing.

S samples of the run, P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis.verdicts import OWN, settled
from opsig_cli.backends import Curvature, Session, State
from opsig_cli.errors import OpsigError
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.silencing import controls_of, strata_of, units_of
from opsig_cli.studies.trained import weights_of
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.states import read_state


def curvature_left(
    run: Trajectory, session: Session, clusters: Clusters, asked: Collection[int], steps: np.ndarray,
    advance: Callable[..., None], seed: int = 0, aside: Sequence[int] = (),
) -> dict[int, list[float]]:  # fmt: skip
    """R of the pairs asked for, by number from 0, at each checkpoint until the rest cannot change what it comes to.

    The direction is the gradient of a side's mean loss; which side's counts, `of_pairs` says. What is left out is what
    silence leaves out (see `silencing.silence`): the family that a pair belongs to, or as many others. Pairs that are
    set `aside`, but for those of the same unit, count in neither: pairs that share labels share
    directions, and one puts curvature along the gradients of another. Empty where nobody can measure it.
    """
    if not asked or not isinstance(session, backends.Slopes) or not isinstance(session, Curvature):
        return {}
    pairs = clusters.grouping.pairs()
    members = [clusters.position[clusters.grouping.members(g)] for g in range(len(clusters.grouping.partner_G))]
    labels, grouped = strata_of(run), np.concatenate(members)
    weights = weights_of(run)
    found: dict[int, list[float]] = {number: [] for number in asked}
    for place, step in enumerate(map(int, steps)):
        state = replace(read_state(run, step), optimizer={})
        for unit, numbers in units_of(clusters):
            chosen = [n for n in numbers if n in found and not settled(found[n], len(steps) - place)]
            if not chosen:
                continue
            silent = np.concatenate([members[group] for group in unit])
            gone_G = {group for number in aside for group in pairs[number]} - set(unit)
            gone = np.concatenate([np.empty(0, np.int64), *(members[group] for group in sorted(gone_G))])
            controls = controls_of(labels, silent, grouped, np.random.default_rng([seed, step, *unit]), gone)

            def along(group: int, state=state, silent=silent, controls=controls, gone=gone) -> float:
                direction = direction_of(session, state, run.samples[members[group]], session.samples)
                curvature = session.slopes_along(state, direction[None])[1][:, 0]  # of all that train
                weighted = curvature.copy() if weights is None else curvature * weights
                weighted[run.samples[gone]] = 0
                return left(weighted, run.samples[silent], run.samples[controls])

            try:
                ratios = of_pairs({number: pairs[number] for number in chosen}, along)
            except OpsigError:  # a layer without a second derivative
                return {}
            for number, ratio in ratios.items():
                found[number].append(ratio)
        advance(note=f"step {step}")
    return found


def of_pairs(pairs: Mapping[int, tuple[int, int]], along: Callable[[int], float]) -> dict[int, float]:
    """R of each of these pairs of groups: the larger of R `along` its two groups, or the first that is OWN or more, as
    the other then decides nothing and is not measured. Groups that several pairs have go first.

    >>> of_pairs({0: (1, 2), 1: (2, 3)}, {2: 0.5}.__getitem__), of_pairs({0: (1, 2)}, {1: 0.1, 2: 0.2}.__getitem__)
    ({0: 0.5, 1: 0.5}, {0: 0.2})
    """
    sides, found = Counter(group for pair in pairs.values() for group in pair), dict[int, float]()
    for group in sorted(sides, key=lambda group: (-sides[group], group)):
        waiting = [number for number, pair in pairs.items() if group in pair and found.get(number, 0) < OWN]
        if waiting:
            ratio = along(group)
            found |= {number: max(ratio, found.get(number, ratio)) for number in waiting}
    return found


def others_than(clusters: Clusters, number: int, aside: Sequence[int]) -> list[int]:
    """Those of the pairs set `aside` that are set aside for this one: that are not silent with it."""
    own = next(numbers for _, numbers in units_of(clusters) if number in numbers)
    return [other for other in aside if other not in own]


def direction_of(session: Curvature, state: State, samples: np.ndarray, count: int) -> np.ndarray:
    """Direction of the gradient of the mean loss of some of `count` samples, (P,) float32 of unit length, 0 where there
    is none."""
    weights = np.zeros(count)
    weights[samples] = count / len(samples)
    gradient = session.gradient(state, weights).astype(np.float64)
    return (gradient / max(float(np.linalg.norm(gradient)), 1e-300)).astype(np.float32)


def left(curvature_S: np.ndarray, silent: np.ndarray, controls: np.ndarray) -> float:
    """What is left of the sum of the curvatures without the silent samples over what is left without the controls;
    infinite where nothing is left then.

    >>> left(np.array([4.0, 4.0, 1.0, 1.0]), np.array([0, 1]), np.array([2, 3]))
    0.25
    """
    known_S = np.nan_to_num(curvature_S)  # a sample without a target has no loss
    whole = float(known_S.sum())
    without, controlled = whole - float(known_S[silent].sum()), whole - float(known_S[controls].sum())
    return without / controlled if controlled > 0 else float("inf")
