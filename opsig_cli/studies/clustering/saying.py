"""What `cluster` says: records of pairs, groups and members, their sentences, and tables for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from opsig_cli.analysis.mining import ALTERNATES
from opsig_cli.errors import OpsigError
from opsig_cli.studies.clustering.agreement import SIGNIFICANT
from opsig_cli.studies.clustering.weighing import Clusters, GroupWeight, PairWeight
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import Texts, clause

SENTENCES = 5
"""Pairs that a table tells in words."""


def records(run: Trajectory, clusters: Clusters) -> list[dict[str, Any]]:
    """A record for every pair, one for every group, then one for every member of a group, in each pair of the group's.

    Numbers of groups and pairs start at 1.
    """
    found, window = clusters.grouping, clusters.window
    labels_S = run.read("samples/label") if run.has("samples/label") else None
    labels = None if labels_S is None else labels_S[clusters.position]
    members = [found.members(group) for group in range(len(found.partner_G))]
    mixes = [_mix(labels, inside) for inside in members]
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


def caveat(clusters: Clusters) -> str | None:
    """What the grouping cannot tell, in a sentence; None where gradients were compared."""
    if clusters.by != "loss":
        return None
    text = "losses alone do not show which samples share a feature: "
    if clusters.period_two > ALTERNATES:
        return text + (
            f"{clusters.period_two:.0%} of the movement here is period two, at which any two samples correlate at +1 "
            "or -1, so that pairs with different features are merged. Gradients tell them apart (--by gradient)"
        )
    return text + "samples can move together by chance or because they are equally hard. Gradients tell (--by gradient)"


def describe(mix: dict[str, int] | None, size: int) -> str:
    """A group's members in words: the label that nine in ten share, or the two most common.

    >>> describe({"Coat": 12, "Shirt": 9, "Bag": 2, "Dress": 1}, 24)
    '12 x Coat, 9 x Shirt, 3 more'
    """
    if not mix:
        return f"{size} samples"
    if size > 2 and max(mix.values()) == 1:  # labels of their own, as the inputs of a regression have
        return f"{size} samples, as {next(iter(mix))}"
    common = list(mix.items())[:2] if next(iter(mix.values())) < 0.9 * size else list(mix.items())[:1]
    rest = size - sum(count for _, count in common)
    words = [f"{count} x {label}" for label, count in common]
    return ", ".join(words + ([f"{rest} more"] if rest else []))


def pair_sentence(
    names: tuple[str, str], weight: PairWeight, rise_step: int, measure: str = "cosine", where: str = ""
) -> str:
    """A pair in one sentence; `where` says what the contexts of text share."""
    cosine = plus_minus(weight.opposition, weight.opposition_error)
    text = f"{names[0]} and {names[1]} pull against each other{where}: {measure} {cosine}"
    up, down = weight.changes
    text += f"; at step {rise_step} their losses changed by {up:+.2g} and {down:+.2g} nats, together {_part(weight)}"
    if weight.p_value == 1:
        text += ". " + _why_not(weight, measure)
    return text


def _why_not(weight: PairWeight, measure: str) -> str:
    """Why a pair is not significant."""
    if not np.isfinite(weight.loss_correlation):
        return "The losses of one side do not move, so this is no opposition that can be seen"
    if measure == "cosine" and not np.isfinite(weight.opposition_error):
        return "It was measured at one checkpoint alone, which is too little to tell it from chance"
    if weight.loss_correlation >= 0:
        return f"Their losses move together ({weight.loss_correlation:.2f}), so this is no opposition that can be seen"
    if not np.isfinite(weight.claim):
        return "Chance gives as strong a pair"
    return (
        f"They hardly share a feature ({weight.shared:.2f} alike, claim {weight.claim:.2f}): it may be by labels alone"
    )


def group_sentence(name: str, against: str | None, weight: GroupWeight, rise_step: int, measure: str = "cosine") -> str:
    """A group in one sentence."""
    text = f"{name} moves together: {measure} {plus_minus(weight.cohesion, weight.cohesion_error)}"
    text += f", against {against}" if against else ", and no group pulls against it"
    return f"{text}; at step {rise_step} their loss changed by {weight.change:+.2g} nats, {_part(weight)}"


def _part(weight: PairWeight | GroupWeight) -> str:
    """The share of the rise where that says something, else of the movement: opposing changes cancel in a rise."""
    if 0 < weight.share <= 1:
        return f"{weight.share:.0%} of the whole loss's rise"
    return f"{weight.movement:.0%} of all samples' movement"


def plus_minus(value: float, error: float) -> str:
    """A number with its error, where it has one.

    >>> plus_minus(-0.617, 0.0213), plus_minus(0.5, float("nan"))
    ('-0.62 +- 0.02', '0.50')
    """
    return f"{value:.2f}" + (f" +- {error:.2f}" if np.isfinite(error) else "")


def _mix(labels: np.ndarray | None, members: np.ndarray) -> dict[str, int] | None:
    return None if labels is None else dict(Counter(labels[members].tolist()).most_common())


def by_strength(pairs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records of pairs, the significant ones first, then those that move most."""
    return sorted(pairs, key=lambda pair: (pair["p_value"], -pair["movement"]))


def _pairs(written: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
    return by_strength(record for record in written if record["kind"] == "pair")


def pair_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of pairs, shortened to what a person reads in a row."""
    rows = []
    for pair in _pairs(written):
        sides = [
            f"G{group}: {describe(mix, size)}".replace("' '", "'\u2423'")  # a token of one blank
            for group, size, mix in zip(pair["groups"], pair["sizes"], pair["labels"], strict=True)
        ]
        rows.append({
            "pair": pair["pair"],
            "one side": sides[0],
            "against": sides[1],
            **({} if pair["after"] is None else {"after": repr(pair["after"]["text"])}),
            "correlation" if pair["by"] == "loss" else "cosine": f"{pair['opposition']:.2f}",
            "losses": f"{pair['loss_correlation']:.2f}",
            **({} if pair["by"] == "loss" else {"alike": _two_digits(pair["shared"])}),
            "moves": f"{pair['movement']:.0%}",
            "p": f"{pair['p_value']:.3f}",
            "stable": f"{pair['stability']:.2f}",
        })  # fmt: skip
    return rows


def _two_digits(value: float) -> str | None:
    return f"{value:.2f}" if np.isfinite(value) else None


def sentence_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sentences of the first significant pairs."""
    pairs = [pair for pair in _pairs(written) if pair["p_value"] < SIGNIFICANT]
    return [{"pair": pair["pair"], "sentence": pair["sentence"]} for pair in pairs[:SENTENCES]]


def alone_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of groups that nothing opposes, shortened to what a person reads in a row."""
    return [
        {
            "group": f"G{group['group']}: {describe(group['labels'], group['size'])}".replace("' '", "'\u2423'"),
            "correlation" if group["by"] == "loss" else "cosine": plus_minus(
                group["cohesion"], group["cohesion_error"]
            ),
            "moves": f"{group['movement']:.0%}",
            "p": f"{group['p_value']:.3f}",
            "stable": f"{group['stability']:.2f}",
        }
        for group in written
        if group["kind"] == "group" and group["pair"] is None
    ]


def explain(run: Trajectory, clusters: Clusters, step: int) -> list[dict[str, Any]]:
    """The change of the whole loss at a step taken apart into groups, the largest first, and what remains.

    Members that joined count with their group. Changes are summed over samples, in nats. Raises OpsigError for a step
    without losses, or the first.
    """
    steps = run.steps("losses")
    row = int(np.searchsorted(steps, step))
    if row == 0 or row == len(steps) or steps[row] != step:
        raise OpsigError(f"{run.path} has no change of losses at step {step}. It has: {steps[1]} to {steps[-1]}")
    before, after = run.rows("losses/loss", row - 1, row + 1).astype(np.float64)
    change_S = after - before
    whole, movement = float(change_S.sum()), float(np.abs(change_S).sum())
    found = clusters.grouping
    labels = run.read("samples/label") if run.has("samples/label") else None
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    pair_of = {group: number + 1 for group, number in found.own_pairs().items()}
    parts: list[tuple[int | None, np.ndarray]] = []
    rest = np.ones(len(change_S), bool)
    for group in range(len(found.partner_G)):
        members = position[group_of == group]
        rest[members] = False
        parts.append((group, members))
    parts.sort(key=lambda part: -abs(float(change_S[part[1]].sum())))
    parts.append((None, np.flatnonzero(rest)))
    return [
        {
            "kind": "explain",
            "trajectory": run.path,
            "step": step,
            "previous_step": int(steps[row - 1]),
            "group": None if group is None else group + 1,
            "pair": None if group is None else pair_of.get(group),
            "size": len(members),
            "labels": None if group is None else _mix(labels, members),
            "change": float(change_S[members].sum()),
            "mean_change": float(change_S[members].mean()) if len(members) else None,
            "share": float(change_S[members].sum()) / whole if whole else None,
            "movement": float(np.abs(change_S[members]).sum()) / movement if movement else None,
            "rising": float((change_S[members] > 0).mean()) if len(members) else None,
        }
        for group, members in parts
    ]


def explain_table(explained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of `explain`, shortened to what a person reads in a row, and their sum."""
    rows = [
        {
            "group": "all others" if r["group"] is None else f"G{r['group']}: {describe(r['labels'], r['size'])}",
            "pair": r["pair"],
            "samples": r["size"],
            "change": r["change"],
            "a sample": r["mean_change"],
            "of whole": None if r["share"] is None else f"{r['share']:.0%}",
            "movement": None if r["movement"] is None else f"{r['movement']:.0%}",
        }
        for r in explained
    ]
    total = {"group": "the whole loss", "samples": sum(r["size"] for r in explained)}
    return [*rows, total | {"change": sum(r["change"] for r in explained)}]
