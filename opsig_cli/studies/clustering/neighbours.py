"""Who opposes one sample: its group, the groups against it, its nearest opponents and allies. S samples, G groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.studies import mining, tracking
from opsig_cli.studies.clustering import gathering
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.records import mix_of
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.clustering.window import Window
from opsig_cli.studies.results import Note, Progress
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import Texts

NEAREST = 10
"""Allies, and opponents, that are named."""


@dataclass(frozen=True)
class Near:
    """One sample's column in the file, and its similarity with every sample, (S,): NaN for itself."""

    position: int
    similarity_S: np.ndarray


def near_to(
    run: Trajectory, whole: Trajectory, clusters: Clusters, sample: int, task: str | None, device: str | None,
    backend: str | None, note: Note, progress: Progress, allow_changed_data: bool = False,
) -> Near:  # fmt: skip
    """How similar a sample of this index is to all others, by what the groups were found by: the mean cosine of their
    gradients over the checkpoints that found the groups, or the correlation of loss changes, of `whole`, the run with
    its gaps filled.

    Raises OpsigError where the run has no such sample, or its task cannot be opened.
    """
    (position,) = mining.positions_of(run, [sample]).tolist()
    if clusters.by == "loss":
        similarity_S = loss_similarity(whole, position, clusters.window)
    else:
        session, _ = tracking.open_session(run, task, device, backend, note, allow_changed_data)
        steps, everybody = np.array(clusters.tests.found_on), np.arange(len(run.samples))
        with progress("neighbours", len(steps)) as advance:
            similarity_S = np.zeros(len(everybody))
            every = gathering.group_cosines(run, session, steps, everybody, [run.samples[[position]]])
            for step, means_S1 in zip(steps.tolist(), every, strict=True):
                similarity_S += means_S1[:, 0] / len(steps)
                advance(note=f"step {step}")
    similarity_S[position] = np.nan
    return Near(position, similarity_S)


def loss_similarity(run: Trajectory, position: int, window: Window) -> np.ndarray:
    """Correlation of a sample's one-step loss changes with those of every sample over the window, (S,) float64; 0 where
    one of them does not move, or was not measured."""
    own_T = np.diff(run.series("losses/loss", np.array([position]), window.first, window.stop)[:, 0].astype(np.float64))
    count, sums, squares, products, previous = 0, 0.0, 0.0, 0.0, None
    for _, rows in run.blocks("losses/loss", window.first, window.stop):
        rows = rows.astype(np.float64)
        joined = rows if previous is None else np.concatenate([previous[None], rows])
        changes = np.diff(joined, axis=0)
        part = own_T[count : count + len(changes), None]
        count, previous = count + len(changes), rows[-1]
        sums, squares = sums + changes.sum(0), squares + (changes**2).sum(0)
        products = products + (part * changes).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = products - own_T.sum() * sums / count
        spread = np.sqrt(((own_T**2).sum() - own_T.sum() ** 2 / count) * (squares - sums**2 / count))
        return np.nan_to_num(covariance / spread, nan=0.0, posinf=0.0, neginf=0.0)


def records(run: Trajectory, clusters: Clusters, near: Near) -> list[dict[str, Any]]:
    """A record of kind "sample", and of kind "neighbour" one for each of its nearest allies and opponents, the nearest
    first.

    `against`: the groups that are in a pair with the sample's own, the strongest pair first, each with the sample's
    mean similarity with it; where the sample is in no group, those that it opposes.
    """
    found, ids, texts = clusters.grouping, run.samples, Texts(run)
    labels_S = run.read("samples/label") if run.has("samples/label") else None
    labels = None if labels_S is None else labels_S[clusters.position]
    group_S = np.full(len(ids), -1)
    group_S[clusters.position] = found.group_M
    mined = bool(group_S[near.position] >= 0)
    group_S[clusters.joined.position] = clusters.joined.group
    own = int(group_S[near.position])
    members = [found.members(group) for group in range(len(found.partner_G))]
    mixes = [mix_of(labels, inside) for inside in members]
    names = [f"G{g + 1} ({describe(mix, len(members[g]))})" for g, mix in enumerate(mixes)]
    means_G = np.array([np.nanmean(near.similarity_S[clusters.position[inside]]) for inside in members])
    in_pairs = sorted(
        (number, b if a == own else a) for number, (a, b) in zip(clusters.numbers(), found.pairs(), strict=True)
        if own in (a, b)
    )  # fmt: skip
    facing: list[tuple[int | None, int]] = [(number, group) for number, group in in_pairs]
    if own < 0:
        facing = [(None, int(group)) for group in np.argsort(means_G, kind="stable")[:3] if means_G[group] < 0]
    label = None if labels_S is None else str(labels_S[near.position])
    sample = int(ids[near.position])
    common = {"trajectory": run.path, "by": clusters.by}
    against = [
        {"group": g + 1, "pair": number, "size": len(members[g]), "labels": mixes[g], "similarity": float(means_G[g])}
        for number, g in facing
    ]
    written: list[dict[str, Any]] = [{
        "kind": "sample", **common, "sample": sample, "label": label, **texts.field(near.position),
        "group": None if own < 0 else own + 1, "size": None if own < 0 else len(members[own]),
        "labels": None if own < 0 else mixes[own], "similarity": None if own < 0 else float(means_G[own]),
        "mined": mined, "against": against,
        "sentence": _sentence(sample, label, None if own < 0 else (names[own], float(means_G[own]), mined),
                              [(names[g], float(means_G[g])) for _, g in facing], clusters.by),
    }]  # fmt: skip
    known = np.where(np.isfinite(near.similarity_S), near.similarity_S, 0)
    for relation, order in (
        ("opponent", np.argsort(known, kind="stable")),
        ("ally", np.argsort(-known, kind="stable")),
    ):
        sign = -1 if relation == "opponent" else 1
        for rank, position in enumerate([p for p in order[:NEAREST].tolist() if sign * known[p] > 0], 1):
            written.append({
                "kind": "neighbour", **common, "of": sample, "relation": relation, "rank": rank,
                "sample": int(ids[position]), "similarity": float(known[position]),
                "label": None if labels_S is None else str(labels_S[position]),
                "group": None if group_S[position] < 0 else int(group_S[position]) + 1, **texts.field(position),
            })  # fmt: skip
    return written


def _sentence(
    sample: int, label: str | None, own: tuple[str, float, bool] | None, against: list[tuple[str, float]], by: str
) -> str:
    measure = "correlation" if by == "loss" else "cosine"
    text = f"sample {sample}" + (f" ({label})" if label is not None else "")
    if own is None:
        text += " is in no group"
        return text + (f"; it opposes {_listed(against, measure)} most" if against else ", and opposes none")
    name, similarity, mined = own
    text += f" is in {name}" if mined else f" joined {name}"
    text += f", {measure} {similarity:.2f} with it on average"
    return text + (f"; against it is {_listed(against, measure)}" if against else "; nothing pulls against that group")


def _listed(groups: list[tuple[str, float]], measure: str) -> str:
    return " and ".join(f"{name}, {measure} {similarity:.2f}" for name, similarity in groups)


def sample_table(written: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sample's own group and those against it, a row each."""
    rows = []
    for record in written:
        if record["kind"] == "sample":
            measure = "correlation" if record["by"] == "loss" else "cosine"
            if record["group"] is not None:
                rows.append({"what": "its group", "group": _named(record), "pair": None,
                             measure: f"{record['similarity']:.2f}"})  # fmt: skip
            rows += [
                {"what": "against it", "group": _named(one), "pair": one["pair"], measure: f"{one['similarity']:.2f}"}
                for one in record["against"]
            ]
    return rows


def neighbour_table(written: list[dict[str, Any]], relation: str) -> list[dict[str, Any]]:
    """Its nearest allies or opponents, a row each."""
    return [
        {
            "sample": r["sample"],
            **({"text": " ".join(r["text"].split())[-40:]} if "text" in r else {"label": r["label"]}),
            "group": None if r["group"] is None else f"G{r['group']}",
            "correlation" if r["by"] == "loss" else "cosine": f"{r['similarity']:.2f}",
        }
        for r in written
        if r["kind"] == "neighbour" and r["relation"] == relation
    ]


def _named(group: dict[str, Any]) -> str:
    return f"G{group['group']}: {describe(group['labels'], group['size'])}"
