"""The change of the whole loss at one step, taken apart into groups."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.records import mix_of
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.trajectory.file import Trajectory


def explain(run: Trajectory, clusters: Clusters, step: int) -> list[dict[str, Any]]:
    """The change of the whole loss at a step taken apart into groups, the largest first, and what remains.

    Members that joined count with their group. Changes are summed over samples, in nats. Raises OpsigError for a step
    without losses, or the first.
    """
    steps = run.steps("losses")
    row = int(np.searchsorted(steps, step))
    if row == 0 or row == len(steps) or steps[row] != step:
        raise OpsigError(f"{run.path} has no change of losses at step {step}. It has: {steps[1]} to {steps[-1]}")
    run.check("losses", np.array([row - 1, row]))
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
            "labels": None if group is None else mix_of(labels, members),
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
