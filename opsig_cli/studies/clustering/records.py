"""What `cluster` hands on: a record for every pair, group and member."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from opsig_cli.studies.clustering.clusters import Clusters, GroupWeight, PairWeight
from opsig_cli.studies.clustering.sentences import caveat, describe, group_sentence, pair_sentence
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import Texts, clause


def records(run: Trajectory, clusters: Clusters) -> list[dict[str, Any]]:
    """A record for every pair, one for every group, then one for every member of a group, in each pair of the group's.

    Numbers of groups and pairs start at 1.
    """
    found, window = clusters.grouping, clusters.window
    labels_S = run.read("samples/label") if run.has("samples/label") else None
    labels = None if labels_S is None else labels_S[clusters.position]
    members = [found.members(group) for group in range(len(found.partner_G))]
    mixes = [mix_of(labels, inside) for inside in members]
    names = [f"G{g + 1} ({describe(mix, len(members[g]))})" for g, mix in enumerate(mixes)]
    joined = [int((clusters.joined.group == group).sum()) for group in range(len(members))]
    rise_step = int(window.steps_T[window.rise_row])
    measure = "loss correlation" if clusters.by == "loss" else "cosine"
    common = {"by": clusters.by, "caveat": caveat(clusters), "sketch_error": clusters.sketch_error}
    pairs = found.pairs()
    pair_of = {group: number + 1 for group, number in found.own_pairs().items()}
    side_of = {group: 1 if pairs[number - 1][0] == group else -1 for group, number in pair_of.items()}
    partner_of = {group: sum(pairs[number - 1]) - group for group, number in pair_of.items()}
    texts = Texts(run)
    written: list[dict[str, Any]] = []
    for number, ((a, b), weight) in enumerate(zip(pairs, clusters.pairs, strict=True), 1):
        after = texts.after(*(clusters.position[members[group]] for group in (a, b)))
        written.append({
            "kind": "pair",
            "trajectory": run.path,
            "pair": number,
            "groups": [a + 1, b + 1],
            "sizes": [len(members[a]), len(members[b])],
            "joined": [joined[a], joined[b]],
            "labels": [mixes[a], mixes[b]],
            "after": after,
            "cohesion": weight.cohesion,
            "opposition": weight.opposition,
            "opposition_error": weight.opposition_error,
            "shared": weight.shared,
            "claim": weight.claim,
            "loss_correlation": weight.loss_correlation,
            **_evidence(weight),
            "p_value_losses": weight.p_value_losses,
            "rise_step": rise_step,
            "changes": weight.changes,
            "sentence": pair_sentence((names[a], names[b]), weight, rise_step, measure, clause(after)),
            **common,
        })  # fmt: skip
    for group, weight in enumerate(clusters.groups):
        partner = partner_of.get(group)
        against = None if partner is None else names[partner]
        written.append({
            "kind": "group",
            "trajectory": run.path,
            "group": group + 1,
            "pair": pair_of.get(group),
            "partner": None if partner is None else partner + 1,
            "side": side_of.get(group),
            "size": len(members[group]),
            "joined": joined[group],
            "labels": mixes[group],
            "cohesion": weight.cohesion,
            "cohesion_error": weight.cohesion_error,
            **_evidence(weight),
            "rise_step": rise_step,
            "change": weight.change,
            "sentence": group_sentence(names[group], against, weight, rise_step, measure),
            **common,
        })  # fmt: skip
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    alignment = np.concatenate([found.alignment_M, clusters.joined.alignment])
    ids = run.samples
    places: dict[int, list[tuple[int | None, int | None]]] = {}  # of a group: its pairs, with its side in each
    for number, pair in enumerate(pairs, 1):
        for group, side in zip(pair, (1, -1), strict=True):
            places.setdefault(group, []).append((number, side))
    for i in np.argsort(group_of, kind="stable"):
        group = int(group_of[i])
        for number, side in places.get(group, [(None, None)]) if group >= 0 else []:
            written.append({
                "kind": "member",
                "trajectory": run.path,
                "sample": int(ids[position[i]]),
                "group": group + 1,
                "pair": number,
                "side": side,
                "alignment": float(alignment[i]),
                "label": None if labels_S is None else str(labels_S[position[i]]),
                "mined": bool(i < len(clusters.position)),
                **texts.field(int(position[i])),
            })  # fmt: skip
    return written


def _evidence(weight: GroupWeight | PairWeight) -> dict[str, float]:
    """What groups and pairs are weighed by alike, under the records' names."""
    return {
        "share": weight.share,
        "movement": weight.movement,
        "stability": weight.stability,
        "stability_checkpoints": weight.kept,
        "p_value": weight.p_value,
        "p_value_random": weight.p_value_random,
    }


def mix_of(labels: np.ndarray | None, members: np.ndarray) -> dict[str, int] | None:
    return None if labels is None else dict(Counter(labels[members].tolist()).most_common())


def by_strength(pairs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of pairs, the significant ones first, then those that move most."""
    return sorted(pairs, key=lambda pair: (pair["p_value"], -pair["movement"]))
