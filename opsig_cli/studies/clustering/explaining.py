"""The change of the whole loss at one step, taken apart into groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from opsig_cli.analysis.evidence import of_net
from opsig_cli.errors import OpsigError
from opsig_cli.studies import numbers
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.records import mix_of
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.trajectory.file import Trajectory


def row_of(run: Trajectory, step: int) -> int:
    """The row of `losses` at a step that has a row before it. Raises OpsigError for a step without losses, or the
    first."""
    steps = run.steps("losses")
    row = int(np.searchsorted(steps, step))
    if row == 0 or row == len(steps) or steps[row] != step:
        raise OpsigError(f"{run.path} has no change of losses at step {step}. It has: {steps[1]} to {steps[-1]}")
    return row


def explain(run: Trajectory, clusters: Clusters, step: int) -> list[dict[str, Any]]:
    """The change of the whole loss at a step taken apart into groups, the largest first, and what remains.

    Members that joined count with their group, and `joined` says how many of the `size` they are. Changes are summed
    over samples. `movement`: the part of all samples' movement, up and down; `share`: of the net change, None where
    that is close to zero beside all movement. Raises OpsigError as `row_of`.
    """
    row = row_of(run, step)
    before, after = run.rows("losses/loss", row - 1, row + 1).astype(np.float64)
    change_S = after - before
    whole, movement = float(change_S.sum()), float(np.abs(change_S).sum())
    found = clusters.grouping
    labels = run.read("samples/label") if run.has("samples/label") else None
    position = np.concatenate([clusters.position, clusters.joined.position])
    group_of = np.concatenate([found.group_M, clusters.joined.group])
    pair_of = {group: clusters.numbers()[place] for group, place in found.own_pairs().items()}
    own = {group: found.members(group) for group in range(len(found.partner_G))}
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
            "previous_step": int(run.steps("losses")[row - 1]),
            "group": None if group is None else group + 1,
            "pair": None if group is None else pair_of.get(group),
            "size": len(members),
            "joined": None if group is None else len(members) - len(own[group]),
            "labels": None if group is None else mix_of(labels, clusters.position[own[group]]),
            "change": float(change_S[members].sum()),
            "mean_change": float(change_S[members].mean()) if len(members) else None,
            "share": of_net(float(change_S[members].sum()), whole, movement),
            "movement": float(np.abs(change_S[members]).sum()) / movement if movement else None,
            "rising": float((change_S[members] > 0).mean()) if len(members) else None,
        }
        for group, members in parts
    ]


def explain_table(explained: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of `explain`, shortened to what a person reads in a row, and their sum."""
    rows = [
        {
            "group": named(r),
            "pair": r["pair"],
            "joined": r["joined"],
            "samples": r["size"],
            "change": r["change"],
            "a sample": r["mean_change"],
            "of movement": numbers.percent(r["movement"]),
        }
        for r in explained
    ]
    total = {"group": "the whole loss", "samples": sum(r["size"] for r in explained)}
    return [*rows, total | {"change": sum(r["change"] for r in explained), "of movement": "100%"}]


def named(part: Mapping[str, Any]) -> str:
    """A group under the name that it has everywhere, by the members that it was found with."""
    if part["group"] is None:
        return "all others"
    return f"G{part['group']}: {describe(part['labels'], part['size'] - part['joined'])}"
