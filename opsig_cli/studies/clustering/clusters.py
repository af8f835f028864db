"""What a grouping is: its groups and pairs, what speaks for each, and what they were found from.

M samples that are grouped, N that joined, T steps of the window, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opsig_cli.analysis.grouping import Grouping
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
    """What speaks for a group. `cohesion`: mean similarity within. `kept`: share of the members that single checkpoints
    (by losses: halves of the window) put in this group; `stability` under resampling; `p_value` against no structure,
    `p_value_random` against random groups of its size. `share` of the whole loss's rise, `movement` of all movement."""

    cohesion: float
    cohesion_error: float
    stability: float
    kept: float
    p_value: float
    p_value_random: float
    share: float
    movement: float
    change: float


@dataclass(frozen=True)
class PairWeight:
    """What speaks for a pair, as for a group, and: `opposition`, the mean similarity across; `shared`, the mean cosine
    of the two groups' centred features, NaN where there are none; `claim`, by how much looks and opposition exceed
    what labels alone give (see CLAIMS), NaN likewise; `p_value`, 1 where that is little; `loss_correlation` of their
    mean loss changes, and `p_value_losses`, its p-value against phase-shuffled series."""

    cohesion: float
    opposition: float
    opposition_error: float
    shared: float
    claim: float
    loss_correlation: float
    stability: float
    kept: float
    p_value: float
    p_value_random: float
    p_value_losses: float
    share: float
    movement: float
    changes: tuple[float, float]


@dataclass(frozen=True)
class Clusters:
    """The grouping of the samples at `position`, the weight of its groups and pairs in order, what was grouped by
    (M, M), the samples' losses (T, M), and who joined.

    `period_two`: the share of the samples' movement that turns back in the next step. `sketch_error`: half the width of
    the band in which sketched similarities lie, None for exact ones.
    """

    by: str
    position: np.ndarray
    grouping: Grouping
    groups: list[GroupWeight]
    pairs: list[PairWeight]
    similarity_MM: np.ndarray
    losses_TM: np.ndarray
    window: Window
    period_two: float
    joined: Joined = NOBODY
    sketch_error: float | None = None
