"""What `cluster` hands on: a record for every pair, group and member."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.analysis.significance import ROUNDS
from opsig_cli.analysis.verdicts import LEVEL, VERDICTS, remains
from opsig_cli.studies import missing
from opsig_cli.studies.clustering.clusters import Clusters, GroupWeight, PairWeight
from opsig_cli.studies.clustering.sentences import (
    caveat,
    describe,
    group_sentence,
    pair_sentence,
    removed_by_silence,
)
from opsig_cli.studies.numbers import loss_unit
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import Texts, clause


def records(run: Trajectory, clusters: Clusters) -> list[dict[str, Any]]:
    """A record for every pair, one for every group, one for every member of a group, in each pair of the group's, and
    one of what the evidence was taken from.

    Numbers of groups and pairs start at 1.
    """
    texts, told = Texts(run), _told(run, clusters)
    pairs, groups = _pairs(run, clusters, told, texts), _groups(run, clusters, told)
    return [*pairs, *groups, *_members(run, clusters, told, texts), _tests(run, clusters)]


@dataclass(frozen=True)
class _Told:
    """What records say of the samples, of each group by its number from 0, and what all of them say."""

    labels_S: np.ndarray | None
    members: list[np.ndarray]
    mixes: list[dict[str, int] | None]
    names: list[str]
    joined: list[int]
    rise_step: int
    measure: str
    unit: str
    common: dict[str, Any]


def _told(run: Trajectory, clusters: Clusters) -> _Told:
    found, window = clusters.grouping, clusters.window
    labels_S = run.read("samples/label") if run.has("samples/label") else None
    labels = None if labels_S is None else labels_S[clusters.position]
    members = [found.members(group) for group in range(len(found.partner_G))]
    mixes = [mix_of(labels, inside) for inside in members]
    names = [f"G{g + 1} ({describe(mix, len(members[g]))})" for g, mix in enumerate(mixes)]
    joined = [int((clusters.joined.group == group).sum()) for group in range(len(members))]
    measure = "loss correlation" if clusters.by == "loss" else "cosine"
    common = {"by": clusters.by, "caveat": caveat(clusters), "sketch_error": clusters.sketch_error}
    rise_step = int(window.steps_T[window.rise_row])
    return _Told(labels_S, members, mixes, names, joined, rise_step, measure, loss_unit(run), common)


def _pairs(run: Trajectory, clusters: Clusters, told: _Told, texts: Texts) -> Iterator[dict[str, Any]]:
    pairs, numbers = clusters.grouping.pairs(), clusters.numbers()
    for place in np.argsort(numbers).tolist():
        (a, b), weight, number = pairs[place], clusters.pairs[place], numbers[place]
        after = texts.after(*(clusters.position[told.members[group]] for group in (a, b)))
        apart = weight.apart
        apart_step = None if apart is None else int(clusters.window.steps_T[apart[0]])
        removed, controls = removed_by_silence(weight)
        yield {
            "kind": "pair",
            "trajectory": run.path,
            "pair": number,
            "family": weight.family or None,
            "verdict": weight.verdict,
            "reason": weight.reason,
            "groups": [a + 1, b + 1],
            "sizes": [len(told.members[a]), len(told.members[b])],
            "joined": [told.joined[a], told.joined[b]],
            "labels": [told.mixes[a], told.mixes[b]],
            "after": after,
            "cohesion": weight.cohesion,
            "opposition": weight.opposition,
            "opposition_error": weight.opposition_error,
            "opposition_interval": list(weight.interval),
            "shared": weight.shared,
            "alike": weight.alike,
            "silencing": removed,
            "silencing_control": controls,
            "swing_ratio": remains(weight.silenced) if weight.silenced else None,
            "silenced": [
                {"step": one.step, "swing": one.plain, "silent": one.silent, "controls": one.controls,
                 "swing_ratio": one.ratio}
                for one in weight.silenced
            ],
            "curvature_ratio": float(np.median(weight.curved)) if weight.curved else None,
            "aside": list(weight.aside),
            "loss_correlation": weight.loss_correlation,
            **_evidence(weight),
            "p_value_losses": weight.p_value_losses,
            **_vectors(clusters, place),
            "rise_step": told.rise_step,
            "changes": weight.changes,
            "apart_step": apart_step,
            "apart_changes": None if apart is None else list(apart[1:]),
            "apart_movement": None if apart is None else weight.apart_movement,
            "sentence": pair_sentence(
                (told.names[a], told.names[b]), weight, apart_step, told.measure, clause(after),
                _other_label(told.mixes[a], told.mixes[b]), told.unit,
            ),
            **told.common,
        }  # fmt: skip


def _groups(run: Trajectory, clusters: Clusters, told: _Told) -> Iterator[dict[str, Any]]:
    pairs, numbers, own = clusters.grouping.pairs(), clusters.numbers(), clusters.grouping.own_pairs()
    pair_of = {group: numbers[place] for group, place in own.items()}
    side_of = {group: 1 if pairs[place][0] == group else -1 for group, place in own.items()}
    partner_of = {group: sum(pairs[place]) - group for group, place in own.items()}
    for group, weight in enumerate(clusters.groups):
        partner = partner_of.get(group)
        against = None if partner is None else told.names[partner]
        yield {
            "kind": "group",
            "trajectory": run.path,
            "group": group + 1,
            "pair": pair_of.get(group),
            "partner": None if partner is None else partner + 1,
            "side": side_of.get(group),
            "size": len(told.members[group]),
            "joined": told.joined[group],
            "labels": told.mixes[group],
            "cohesion": weight.cohesion,
            "cohesion_error": weight.cohesion_error,
            **_evidence(weight),
            "rise_step": told.rise_step,
            "change": weight.change,
            "sentence": group_sentence(told.names[group], against, weight, told.rise_step, told.measure, told.unit),
            **told.common,
        }  # fmt: skip


def _members(run: Trajectory, clusters: Clusters, told: _Told, texts: Texts) -> Iterator[dict[str, Any]]:
    found, labels_S = clusters.grouping, told.labels_S
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    alignment = np.concatenate([found.alignment_M, clusters.joined.alignment])
    ids, names_S = run.samples, missing.names_of(run)
    places: dict[int, list[tuple[int | None, int | None]]] = {}  # of a group: its pairs, with its side in each
    for number, pair in sorted(zip(clusters.numbers(), found.pairs(), strict=True)):
        for group, side in zip(pair, (1, -1), strict=True):
            places.setdefault(group, []).append((number, side))
    for i in np.argsort(group_of, kind="stable"):
        group = int(group_of[i])
        for number, side in places.get(group, [(None, None)]) if group >= 0 else []:
            yield {
                "kind": "member",
                "trajectory": run.path,
                "sample": int(ids[position[i]]),
                **missing.name_of(names_S, int(position[i])),
                "group": group + 1,
                "pair": number,
                "side": side,
                "alignment": float(alignment[i]),
                "label": None if labels_S is None else str(labels_S[position[i]]),
                "mined": bool(i < len(clusters.position)),
                **texts.field(int(position[i])),
            }  # fmt: skip


def _tests(run: Trajectory, clusters: Clusters) -> dict[str, Any]:
    """What the evidence was taken from, and what it cost."""
    tests = clusters.tests
    return {
        "kind": "tests",
        "trajectory": run.path,
        "by": clusters.by,
        "level": LEVEL,
        "found_on": tests.found_on,
        "held_out": tests.held_out,
        "replayed_from": tests.replayed,
        "replays": tests.replays,
        "replayed_steps": tests.replayed_steps,
        "null_rounds": ROUNDS,
    }


def _other_label(one: dict[str, int] | None, other: dict[str, int] | None) -> bool | None:
    """Whether the commonest labels of two sides differ; None without labels, or where hardly two samples share one."""
    if not one or not other or max(one.values()) == max(other.values()) == 1:
        return None
    return next(iter(one)) != next(iter(other))


def _evidence(weight: GroupWeight | PairWeight) -> dict[str, float]:
    """What groups and pairs are weighed by alike, under the records' names."""
    return {
        "share": weight.share,
        "movement": weight.movement,
        "stability": weight.stability,
        "stability_checkpoints": weight.kept,
        "p_value": weight.p_value,
    }


def _vectors(clusters: Clusters, pair: int) -> dict[str, Any]:
    """The eigenvectors that a pair lies on, the clearest first, and of that one the pair's part of the eigenvalue and
    the eigenvalue in units of the threshold; None where slopes were not measured, or it lies on none."""
    on = clusters.on_vectors
    if on is None:
        return dict.fromkeys(("eigenvectors", "sharpness_step", "sharpness_share", "sharpness_ratio"))
    found = [
        {
            "rank": lying.rank + 1, "eigenvalue": float(on.values[lying.rank]),
            "ratio": float(on.values[lying.rank] / on.threshold) if on.threshold else None,
            "slopes": list(lying.slopes), "shares": list(lying.shares),
        }
        for lying in on.lying[pair]
    ]  # fmt: skip
    return {
        "eigenvectors": found,
        "sharpness_step": on.step,
        "sharpness_share": sum(found[0]["shares"]) if found else None,
        "sharpness_ratio": found[0]["ratio"] if found else None,
    }


def mix_of(labels: np.ndarray | None, members: np.ndarray) -> dict[str, int] | None:
    return None if labels is None else dict(Counter(labels[members].tolist()).most_common())


def by_strength(pairs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of pairs, the established ones first, then by verdict, the strongest first; a family together."""
    ordered = sorted(pairs, key=lambda pair: (VERDICTS.index(pair["verdict"]), -_strength(pair)))
    first = {}  # of a family and verdict: where its first pair stands
    for place, pair in enumerate(ordered):
        first.setdefault((pair["verdict"], pair["family"] or -pair["pair"]), place)
    return sorted(ordered, key=lambda pair: first[pair["verdict"], pair["family"] or -pair["pair"]])


def _strength(pair: Mapping[str, Any]) -> float:
    """By what pairs are numbered: see `Clusters.numbers`."""
    return float(pair.get("apart_movement", pair["movement"]) or 0)


def established(pairs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those records of pairs that are established."""
    return [pair for pair in pairs if pair["verdict"] == "established"]
