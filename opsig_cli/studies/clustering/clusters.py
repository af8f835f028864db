"""What a grouping is: its groups and pairs, what speaks for each, and what they were found from.

M samples that are grouped, N that joined, T steps of the window, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.gram import Similarity
from opsig_cli.analysis.grouping import Grouping
from opsig_cli.analysis.slopes import Lying
from opsig_cli.analysis.verdicts import Silenced
from opsig_cli.studies.clustering.window import Window


@dataclass(frozen=True)
class Joined:
    """Samples that were not mined and align with a group: position, group and alignment, (N,) each."""

    position: np.ndarray
    group: np.ndarray
    alignment: np.ndarray


NOBODY = Joined(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class GroupWeight:
    """What speaks for a group, on checkpoints that had no part in finding it (by losses: on the second half of the
    window). `cohesion`: mean similarity within. `kept`: share of the members that single checkpoints put in this group;
    `stability` under resampling; `p_value` against looks from one Gaussian (by losses: against random phases). `share`
    of the whole loss's rise, `movement` of all movement."""

    cohesion: float
    cohesion_error: float
    stability: float
    kept: float
    p_value: float
    share: float
    movement: float
    change: float


@dataclass(frozen=True)
class PairWeight:
    """What speaks for a pair, as for a group, and: `opposition`, the mean similarity across, and the `interval` that it
    lies in over held-out checkpoints; `shared`, the mean cosine of the two groups' centred features, and `alike`, that
    over the same within the groups, NaN where there are none; `loss_correlation` of their mean losses without drift,
    and `p_value_losses`, its p-value against phase-shuffled series; `apart`: the row of the window after the change in
    which they move apart most, and both changes, and `apart_movement` the part of all samples' movement there that is
    the pair's; `family`: number of the finding that the pair is a part of; `curved`: R of the curvature along its
    sides' gradients at each held-out checkpoint, where that was asked for, and the numbers of the pairs that were set
    `aside` for it."""

    cohesion: float
    opposition: float
    opposition_error: float
    interval: tuple[float, float]
    shared: float
    alike: float
    loss_correlation: float
    stability: float
    kept: float
    p_value: float
    p_value_losses: float
    share: float
    movement: float
    changes: tuple[float, float]
    apart: tuple[int, float, float] | None
    family: int = 0
    apart_movement: float = 0.0
    silenced: tuple[Silenced, ...] = ()
    curved: tuple[float, ...] = ()
    aside: tuple[int, ...] = ()
    verdict: str = "unclear"
    reason: str = "it was not tested"


@dataclass(frozen=True)
class Tests:
    """What the groups were tested on: steps of the checkpoints that found them, of those held out, and of those from
    which training was repeated, how often, and for how many steps in all."""

    found_on: list[int]
    held_out: list[int]
    replayed: list[int]
    replays: int = 0
    replayed_steps: int = 0


UNTESTED = Tests([], [], [])


@dataclass(frozen=True)
class OnVectors:
    """The leading eigenvectors at a step, at the "floor" or the "iterate", with eigenvalues (K,) and the threshold, and
    of every pair in order those that it lies on."""

    step: int
    place: str
    values: np.ndarray
    threshold: float
    lying: list[list[Lying]]


@dataclass(frozen=True)
class Clusters:
    """The grouping of the samples at `position`, the weight of its groups and pairs in order, what was grouped by
    (M, M) or its rows, the samples' losses (T, M), and who joined.

    `period_two`: the share of the samples' movement that turns back in the next step. `sketch_error`: half the width of
    the band in which sketched similarities lie, None for exact ones. `alike_GG`: likeness across every two groups over
    that within, None without features; `labelled`: samples share labels. `tests`: what the groups were found and
    weighed on. `on_vectors`: None where slopes are not known.
    """

    by: str
    position: np.ndarray
    grouping: Grouping
    groups: list[GroupWeight]
    pairs: list[PairWeight]
    similarity_MM: Similarity
    losses_TM: np.ndarray
    window: Window
    period_two: float
    alike_GG: np.ndarray | None = None
    joined: Joined = NOBODY
    tests: Tests = UNTESTED
    sketch_error: float | None = None
    on_vectors: OnVectors | None = None
    labelled: bool = False

    def numbers(self) -> list[int]:
        """The number of every pair, from 1 on, the strongest first: by the part of all movement at the step where its
        sides move apart most, which no test that may follow changes."""
        order = sorted(range(len(self.pairs)), key=lambda place: -self.pairs[place].apart_movement)
        return [order.index(place) + 1 for place in range(len(self.pairs))]
