"""How well groups recover what a task planted. S samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.trajectory.file import Trajectory


def agreement(run: Trajectory, clusters: Clusters) -> dict[str, Any]:
    """Adjusted Rand index of the planted sides, and precision and recall of the planted pairs.

    The index is over all planted samples, those in no group counting as one more group, over the mined ones, and over
    those that joined. An established pair is right where it sets two sides with one planted feature against each other.
    Precision: the share of right ones among the pairs with a side that is mostly planted; pairs of other samples may be
    real and are not judged. Recall: the share of planted pairs both of whose sides are in a right pair. Sides are
    judged by the members that were mined alone; `joined_right` is the share of those who joined that are planted on
    the side that their group is.
    """
    from sklearn.metrics import adjusted_rand_score

    if not run.has("samples/truth"):
        raise OpsigError(
            f"{run.path} holds no planted truth. Only runs of a task that plants groups, as planted, have it"
        )
    truth_S = run.read("samples/truth")
    feature_S = run.read("samples/feature") if run.has("samples/feature") else truth_S // 2
    mined_S = np.full(len(truth_S), -1)
    mined_S[clusters.position] = clusters.grouping.group_M
    group_S = mined_S.copy()
    group_S[clusters.joined.position] = clusters.joined.group
    planted = truth_S >= 0
    mined = np.zeros(len(truth_S), bool)
    mined[clusters.position] = True
    feature_of = dict(zip(truth_S[planted].tolist(), feature_S[planted].tolist(), strict=True))
    reported = [
        pair
        for pair, weight in zip(clusters.grouping.pairs(), clusters.pairs, strict=True)
        if weight.verdict == "established"
    ]
    side_of = [_planted_side(truth_S[mined_S == group]) for group in range(len(clusters.grouping.partner_G))]
    pairs = [[side_of[group] for group in pair] for pair in reported]
    joined = [truth_S[p] == side_of[g] for p, g in zip(clusters.joined.position, clusters.joined.group, strict=True)
              if side_of[g] is not None]  # fmt: skip
    concerned = [pair for pair in pairs if pair != [None, None]]
    right = [(a, b) for a, b in concerned if None not in (a, b) and a != b and feature_of[a] == feature_of[b]]
    opposed = {side for pair in right for side in pair}
    sides = sorted(feature_of)
    found = [{2 * pair, 2 * pair + 1} & set(sides) <= opposed for pair in sorted({side // 2 for side in sides})]
    return {
        "kind": "agreement",
        "trajectory": run.path,
        "adjusted_rand_index": float(adjusted_rand_score(truth_S[planted], group_S[planted])),
        "adjusted_rand_index_mined": float(adjusted_rand_score(truth_S[planted & mined], group_S[planted & mined])),
        "joined": len(clusters.joined.position),
        "joined_right": float(np.mean(joined)) if joined else None,
        "established": len(reported),
        "pair_precision": len(right) / len(concerned) if concerned else None,
        "pair_recall": float(np.mean(found)) if found else None,
        "planted": int(planted.sum()),
        "planted_mined": int((planted & mined).sum()),
        "planted_grouped": int((planted & (group_S >= 0)).sum()),
        "other_grouped": int((~planted & (group_S >= 0)).sum()),
    }


def _planted_side(truth_M: np.ndarray) -> int | None:
    """The planted side that most of a group's members are on, or None."""
    sides, counts = np.unique(truth_M, return_counts=True)
    largest = int(counts.argmax())
    return int(sides[largest]) if sides[largest] >= 0 and counts[largest] > len(truth_M) / 2 else None
