"""From mined samples to groups and opposing pairs: similarities gathered, samples grouped, evidence put into words.

M mined samples, C checkpoints, T steps of the window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli import backends
from opsig_cli.analysis import grouping
from opsig_cli.analysis.grouping import Evidence, Grouping
from opsig_cli.backends import Session
from opsig_cli.errors import OpsigError
from opsig_cli.movers import Movers
from opsig_cli.recorder import read_state
from opsig_cli.texts import Texts, clause
from opsig_cli.trajectory import Trajectory

BY = ("gradient", "loss", "both")
CHECKPOINTS = 6
"""C: checkpoints that gradient cosines are averaged over."""


@dataclass(frozen=True)
class Window:
    """The rows of `losses` that the evidence is taken from, and where in them the whole loss rose most.

    `first`, `stop`: rows of the file. `steps_T`: their steps. `rise_row`: the row after the largest rise of the mean
    loss, counted from `first`; `rise`: that rise summed over all samples, in nats.
    """

    first: int
    stop: int
    steps_T: np.ndarray
    rise_row: int
    rise: float


@dataclass(frozen=True)
class Joined:
    """Samples that were not mined and align with a group: position, group and alignment, (N,) each."""

    position: np.ndarray
    group: np.ndarray
    alignment: np.ndarray


NOBODY = Joined(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))


@dataclass(frozen=True)
class Trust:
    """How far a pair can be trusted: `stability` under resampling, 0 to 1, `p_value` against no structure, and
    `p_value_losses` of its losses' correlation against phase-shuffled series."""

    stability: float
    p_value: float
    p_value_losses: float


@dataclass(frozen=True)
class Clusters:
    """The grouping of the samples at `position`, the evidence of its pairs in order, what was grouped by (M, M), the
    samples' losses (T, M), and who joined."""

    by: str
    position: np.ndarray
    grouping: Grouping
    evidence: list[Evidence]
    trust: list[Trust]
    similarity_MM: np.ndarray
    losses_TM: np.ndarray
    window: Window
    joined: Joined = NOBODY


def window_of(run: Trajectory, movers: Movers) -> Window:
    """From the first alternation at period two (else from the start) to the end of what was mined."""
    movement = movers.movement
    begin = movement.first_alternation or 0
    if len(movement.mean_T) - begin < 3:
        begin = 0
    rises = np.diff(movement.mean_T[begin:])
    if len(rises) < 2:
        raise OpsigError(f"{run.path} has too few steps with losses to group samples. Record more: opsig train --track")
    rise_row = int(rises.argmax()) + 1
    first, stop = movers.first + begin, movers.first + len(movement.mean_T)
    return Window(first, stop, run.steps("losses")[first:stop], rise_row, float(rises.max()) * len(run.samples))


def mean_similarity(
    run: Trajectory, session: Session, backend: str, position: np.ndarray, window: Window, advance: Callable[..., None]
) -> np.ndarray:
    """Gradient cosines of the samples, averaged over checkpoints spread over the window, (M, M) float32."""
    backends.require(session, backends.GradientCosines, backend, "gradient cosines")
    steps = checkpoints_in(run, window)
    samples = run.samples[position]
    total = np.zeros((len(samples), len(samples)), np.float32)
    for step in steps.tolist():
        found = session.gradient_cosines(read_state(run, step), samples)  # pyright: ignore
        np.add(total, np.nan_to_num(found, copy=False), out=total, casting="same_kind")
        advance(note=f"step {step}")
    total /= len(steps)
    return total


def checkpoints_in(run: Trajectory, window: Window) -> np.ndarray:
    """The steps of the checkpoints whose gradients are compared. Raises OpsigError where the run has none."""
    run.require("checkpoints/params")
    return grouping.spread(int(window.steps_T[0]), int(window.steps_T[-1]), run.steps("checkpoints"), CHECKPOINTS)


def by_gradient(
    run: Trajectory, session: Session, position: np.ndarray, by: str, window: Window, similarity_MM: np.ndarray,
    joining: bool, advance: Callable[..., None],
) -> Clusters:  # fmt: skip
    """Group the samples by their mean gradient cosines; with `by` "both" a pair's losses are its second evidence.

    Every pair is scored anew at each checkpoint from the mean gradients of its groups. With `joining`, samples that
    were not mined join the group with which they align as well as its own members do.
    """
    found = grouping.group_by_similarity(similarity_MM, _smallest(position))
    sets = [run.samples[position[found.members(group)]] for group in range(len(found.partner_G))]
    everybody = np.arange(len(run.samples)) if joining else position
    means_CNG = np.zeros((0, len(everybody), 0))
    if sets:
        rows = []
        for step in checkpoints_in(run, window).tolist():
            rows.append(session.mean_cosines(read_state(run, step), run.samples[everybody], sets))  # pyright: ignore
            advance(note=f"step {step}")
        means_CNG = np.nan_to_num(np.stack(rows))
    place = position if joining else np.arange(len(position))
    across = {(a, b): means_CNG[:, place[found.members(a)], b].mean(1) for a, b in found.pairs()}
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    clusters = _weigh(by, position, found, similarity_MM, similarity_MM, across, losses_TM, window)
    outside = np.setdiff1d(everybody, position)
    if not sets or not len(outside):
        return clusters
    group, alignment = grouping.join(means_CNG.mean(0), found, outside)
    inside = group >= 0
    return replace(clusters, joined=Joined(outside[inside], group[inside], alignment[inside]))


def by_loss(run: Trajectory, position: np.ndarray, window: Window) -> Clusters:
    """Group the samples by the correlation of their loss changes in the first half of the window, and test the groups
    on the second."""
    losses_TM = run.series("losses/loss", position, window.first, window.stop)
    half = len(losses_TM) // 2
    first_MM, second_MM = (
        np.nan_to_num(grouping.change_correlation(part)) for part in (losses_TM[: half + 1], losses_TM[half:])
    )
    found = grouping.group_by_similarity(first_MM, _smallest(position))
    across = {
        (a, b): second_MM[np.ix_(found.members(a), found.members(b))].mean(keepdims=True)[0] for a, b in found.pairs()
    }
    return _weigh("loss", position, found, first_MM, second_MM, across, losses_TM, window)


def _smallest(position: np.ndarray) -> int:
    return grouping.SMALLEST if len(position) >= 10 * grouping.SMALLEST else 2


def _weigh(
    by: str, position: np.ndarray, found: Grouping, similarity_MM: np.ndarray, tested_MM: np.ndarray,
    across: dict[tuple[int, int], np.ndarray], losses_TM: np.ndarray, window: Window,
) -> Clusters:  # fmt: skip
    """The groups with their pairs' evidence from `tested_MM` and the similarity `across` a pair at each checkpoint."""
    smallest = _smallest(position)
    stability = grouping.pair_stability(similarity_MM, found, smallest)
    null = grouping.null_strengths(tested_MM, smallest=smallest) if across else np.empty(0)
    evidence, trust = [], []
    for a, b in found.pairs():
        members = found.members(a), found.members(b)
        weighed = grouping.evidence(tested_MM, across[a, b], losses_TM, window.rise_row, window.rise, *members)
        strength = grouping.strength(weighed.opposition, *map(len, members))
        changes = [np.diff(losses_TM[:, side].mean(1, dtype=np.float64)) for side in members]
        evidence.append(weighed)
        trust.append(
            Trust(stability[a, b], grouping.p_value(strength, null), grouping.series_p_value(changes[0], changes[1]))
        )
    return Clusters(by, position, found, evidence, trust, similarity_MM, losses_TM, window)


def records(run: Trajectory, clusters: Clusters) -> list[dict[str, Any]]:
    """A record for every pair, then one for every member of a group. Numbers of groups and pairs start at 1."""
    found = clusters.grouping
    pairs = found.pairs()
    labels = run.read("samples/label")[clusters.position] if run.has("samples/label") else None
    mixes = [_mix(labels, found.members(group)) for group in range(len(found.partner_G))]
    texts = Texts(run)
    rise_step = int(clusters.window.steps_T[clusters.window.rise_row])
    written: list[dict[str, Any]] = []
    number, side = {}, {}
    for pair, ((a, b), evidence, trust) in enumerate(zip(pairs, clusters.evidence, clusters.trust, strict=True), 1):
        number |= {a: pair, b: pair}
        side |= {a: 1, b: -1}
        sizes = [len(found.members(a)), len(found.members(b))]
        after = texts.after(*(clusters.position[found.members(group)] for group in (a, b)))
        written.append({
            "kind": "pair",
            "trajectory": run.path,
            "pair": pair,
            "groups": [a + 1, b + 1],
            "sizes": sizes,
            "joined": [int((clusters.joined.group == group).sum()) for group in (a, b)],
            "labels": [mixes[a], mixes[b]],
            "after": after,
            "cohesion": evidence.cohesion,
            "opposition": evidence.opposition,
            "opposition_error": evidence.opposition_error,
            "loss_correlation": evidence.loss_correlation,
            "losses_oppose": evidence.loss_correlation < 0 if clusters.by == "both" else None,
            "share": evidence.share,
            "stability": trust.stability,
            "p_value": trust.p_value,
            "p_value_losses": trust.p_value_losses,
            "rise_step": rise_step,
            "changes": evidence.changes,
            "sentence": _sentence((a, b), sizes, (mixes[a], mixes[b]), evidence, rise_step, clause(after)),
        })  # fmt: skip
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    alignment = np.concatenate([found.alignment_M, clusters.joined.alignment])
    ids, labels = run.samples, run.read("samples/label") if run.has("samples/label") else None
    for i in np.argsort(group_of, kind="stable"):
        group = int(group_of[i])
        if group >= 0:
            written.append({
                "kind": "member",
                "trajectory": run.path,
                "sample": int(ids[position[i]]),
                "group": group + 1,
                "pair": number.get(group),
                "side": side.get(group),
                "alignment": float(alignment[i]),
                "label": None if labels is None else str(labels[position[i]]),
                "mined": bool(i < len(clusters.position)),
                **texts.field(int(position[i])),
            })  # fmt: skip
    return written


def table(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of pairs, shortened to what a person reads in a row."""
    rows = []
    for pair in pairs:
        sides = [
            f"G{group}: {describe(mix, size)}"
            for group, size, mix in zip(pair["groups"], pair["sizes"], pair["labels"], strict=True)
        ]
        error = pair["opposition_error"]
        rows.append({
            "pair": pair["pair"],
            "one side": sides[0],
            "against": sides[1],
            **({} if pair["after"] is None else {"after": repr(pair["after"]["text"])}),
            "cosine": f"{pair['opposition']:.2f}" + (f"+-{error:.2f}" if np.isfinite(error) else ""),
            "losses": f"{pair['loss_correlation']:.2f}",
            "p": f"{pair['p_value']:.3f}",
            "stable": f"{pair['stability']:.2f}",
        })  # fmt: skip
    return rows


def describe(mix: dict[str, int] | None, size: int) -> str:
    """A group's members in words: the label that nine in ten share, or the two most common.

    >>> describe({"Coat": 12, "Shirt": 9, "Bag": 2, "Dress": 1}, 24)
    '12 x Coat, 9 x Shirt, 3 more'
    """
    if not mix:
        return f"{size} samples"
    common = list(mix.items())[:2] if next(iter(mix.values())) < 0.9 * size else list(mix.items())[:1]
    rest = size - sum(count for _, count in common)
    words = [f"{count} x {label}" for label, count in common]
    return ", ".join(words + ([f"{rest} more"] if rest else []))


def _mix(labels: np.ndarray | None, members: np.ndarray) -> dict[str, int] | None:
    return None if labels is None else dict(Counter(labels[members].tolist()).most_common())


def _sentence(
    groups: tuple[int, int],
    sizes: list[int],
    mixes: tuple[dict[str, int] | None, ...],
    evidence: Evidence,
    rise_step: int,
    where: str,
) -> str:
    sides = [f"G{g + 1} ({describe(mix, size)})" for g, size, mix in zip(groups, sizes, mixes, strict=True)]
    text = f"{sides[0]} and {sides[1]} pull against each other{where}: cosine {evidence.opposition:.2f}"
    if np.isfinite(evidence.opposition_error):
        text += f" +- {evidence.opposition_error:.2f}"
    text += (
        f"; at step {rise_step} their losses changed by {evidence.changes[0]:+.2f} and {evidence.changes[1]:+.2f} nats"
    )
    if 0 < evidence.share <= 1:
        text += f", {evidence.share:.0%} of the whole loss's rise"
    return text


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
    whole = float(change_S.sum())
    found = clusters.grouping
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    pair_of = {side: number for number, pair in enumerate(found.pairs(), 1) for side in pair}
    parts = []
    rest = np.ones(len(change_S), bool)
    for group in range(len(found.partner_G)):
        members = position[group_of == group]
        rest[members] = False
        parts.append((group + 1, pair_of.get(group), change_S[members]))
    parts.sort(key=lambda part: -abs(float(part[2].sum())))
    parts.append((None, None, change_S[rest]))
    return [
        {
            "kind": "explain",
            "trajectory": run.path,
            "step": step,
            "previous_step": int(steps[row - 1]),
            "group": group,
            "pair": pair,
            "size": len(changes),
            "change": float(changes.sum()),
            "mean_change": float(changes.mean()) if len(changes) else None,
            "share": float(changes.sum()) / whole if whole else None,
            "rising": float((changes > 0).mean()) if len(changes) else None,
        }
        for group, pair, changes in parts
    ]


def explain_table(explained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of `explain`, shortened to what a person reads in a row."""
    return [
        {
            "group": "all others" if r["group"] is None else f"G{r['group']}",
            "pair": r["pair"],
            "samples": r["size"],
            "change": r["change"],
            "a sample": r["mean_change"],
            "of the whole": None if r["share"] is None else f"{r['share']:.0%}",
        }
        for r in explained
    ]
