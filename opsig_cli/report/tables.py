"""The page's tables: what made the rise, groups that nothing opposes, movers, members, and who aligns with whom.

M samples grouped, G groups.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from opsig_cli.analysis.group_means import between_groups
from opsig_cli.records import write
from opsig_cli.report import words
from opsig_cli.report.images import matrix_image, spread_names
from opsig_cli.report.samples import Samples, strongest
from opsig_cli.studies import mining as finding
from opsig_cli.studies.clustering import agreement, explaining
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.finding import Found
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.clustering.window import Window
from opsig_cli.trajectory.file import Trajectory

CONTRIBUTIONS = 10
"""Groups whose part of the rise is shown."""
ALONE, FEW = 12, 6
"""Groups that nothing opposes, and samples shown of each."""
MOVERS = 100
MEMBERS = 20
"""Members of each group."""
BLOCKS = 18
"""Groups in the table of mean similarities; those in pairs come first."""
NAME = 0.032
"""Part of the matrix's side that a group's name needs."""


def contributions(explained: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups' summed changes at the rise, the largest first, small ones together, and all other samples.

    `from`, `wide`: a bar in per cent, zero in the middle.
    """
    groups = [part for part in explained if part["group"] is not None]
    rows = [dict(part, name=explaining.named(part)) for part in groups[:CONTRIBUTIONS]]
    if small := groups[CONTRIBUTIONS:]:
        rows.append({
            "name": f"{len(small)} smaller groups", "size": sum(part["size"] for part in small),
            "joined": sum(part["joined"] for part in small),
            "change": sum(part["change"] for part in small), "mean_change": None, "pair": None,
            "movement": _sum(part["movement"] for part in small),
        })  # fmt: skip
    rows += [dict(part, name="all other samples") for part in explained if part["group"] is None]
    largest = max((abs(row["change"]) for row in rows if math.isfinite(row["change"])), default=0.0)
    for row in rows:
        row["pairs"] = sorted(pair["pair"] for pair in pairs if row.get("group") in pair["groups"])
        part = row["change"] / largest if largest and math.isfinite(row["change"]) else 0.0
        row["from"], row["wide"] = round(50 + min(0.0, 50 * part), 2), round(abs(50 * part), 2)
    return rows


def _sum(parts) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def alone(clusters: Clusters, samples: Samples, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups that nothing opposes and that move most, with their most aligned members."""
    ordered = sorted((group for group in groups if group["pair"] is None), key=lambda group: -group["movement"])
    return [
        dict(group, name=describe(group["labels"], group["size"]),
             shown=samples.show(strongest(clusters, group["group"] - 1, FEW)))
        for group in ordered[:ALONE]
    ]  # fmt: skip


def movers(run: Trajectory, found: Found, samples: Samples) -> list[dict[str, Any]]:
    """The samples whose loss moved most, as `mine` prints them, with what they look like."""
    first = replace(found.movers, position=found.movers.position[:MOVERS], row=found.movers.row[:MOVERS])
    return [
        dict(record, shown=samples.shown(int(position), record["prediction_before"], record["prediction_after"]))
        for record, position in zip(finding.records(run, first), first.position, strict=True)
    ]


def matrix(clusters: Clusters, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The similarities in order of group as an image with its borders and names, and the mean of every two groups."""
    group_M, similarity_MM = clusters.grouping.group_M, clusters.similarity_MM
    inside = [np.flatnonzero(group_M == group["group"] - 1) for group in groups]
    sizes = [len(m) for m in inside]
    borders = (np.cumsum(sizes) / sum(sizes)).round(4).tolist()
    named = spread_names(sizes, NAME)
    first = [0.0, *borders]
    chosen = sorted(sorted(range(len(groups)), key=lambda g: (groups[g]["pair"] is None, -sizes[g]))[:BLOCKS])
    pairs = {frozenset((a, b)) for a, b in clusters.grouping.pairs()}
    means = between_groups(similarity_MM, group_M)[np.ix_(*[[groups[g]["group"] - 1 for g in chosen]] * 2)].tolist()
    return {
        "image": matrix_image(similarity_MM, np.concatenate(inside)),
        "count": sum(sizes),
        "borders": borders[:-1],
        "names": [(f"G{groups[g]['group']}", round((first[g] + first[g + 1]) / 2, 4)) for g in named],
        "groups": [groups[g]["group"] for g in chosen],
        "labels": [describe(groups[g]["labels"], sizes[g]) for g in chosen],
        "left_out": len(groups) - len(chosen),
        "rows": [
            [(value, _depth(value), frozenset((a, b)) in pairs) for value, b in zip(row, chosen, strict=True)]
            for row, a in zip(means, chosen, strict=True)
        ],
    }


def _depth(value: float) -> str:
    """The class that colours a cell: `p` or `n` and the size in tenths.

    >>> _depth(-0.34), _depth(0.96)
    ('n3', 'p10')
    """
    return f"{'n' if value < 0 else 'p'}{min(10, round(10 * abs(value)))}" if math.isfinite(value) else "p0"


def members(
    run: Trajectory, window: Window, records: Sequence[Mapping[str, Any]], samples: Samples
) -> list[dict[str, Any]]:
    """The most aligned members of every group, each once, with the pairs that its group is in and how its loss changed
    at the rise."""
    rows: dict[int, dict[str, Any]] = {}
    place = {int(sample): position for position, sample in enumerate(run.samples.tolist())}
    for record in (record for record in records if record["kind"] == "member"):
        row = rows.setdefault(record["sample"], dict(record, pairs=[]))
        if record["pair"] is not None:
            row["pairs"].append(record["pair"])
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    shown_already = set(samples.shown_at)
    count: dict[int, int] = {}
    kept = []
    for row in sorted(rows.values(), key=lambda row: (row["group"], -row["alignment"])):
        count[row["group"]] = count.get(row["group"], 0) + 1
        if count[row["group"]] <= MEMBERS or row["sample"] in shown_already:
            kept.append(row)
    others = sorted(shown_already - {row["sample"] for row in kept})
    kept += [{"sample": sample, "group": None, "pairs": [], "alignment": None, "mined": None} for sample in others]
    labels = run.read("samples/label") if run.has("samples/label") else None
    for row in kept:
        position = place[row["sample"]]
        row["label"] = None if labels is None else str(labels[position])
        row["change"] = float(after[position]) - float(before[position])
        (row["shown"],) = samples.show([position])
    return kept


def exported(run: Trajectory, window: Window, records: Sequence[Mapping[str, Any]]) -> str:
    """Every member of every group as a data URI of a CSV file, a row for each of its pairs."""
    verdicts = {record["pair"]: record["verdict"] for record in records if record["kind"] == "pair"}
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    place = {int(sample): position for position, sample in enumerate(run.samples.tolist())}
    rows = []
    for record in (record for record in records if record["kind"] == "member"):
        position = place[record["sample"]]
        rows.append({
            "sample": record["sample"], "label": record["label"], "group": f"G{record['group']}",
            "pair": record["pair"], "side": record["side"], "verdict": verdicts.get(record["pair"]),
            "alignment": record["alignment"], "found_by": "mining" if record["mined"] else "joining",
            "step": int(window.steps_T[window.rise_row]), "loss_before": float(before[position]),
            "loss_after": float(after[position]),
        })  # fmt: skip
    text = io.StringIO()
    write(rows, "csv", out=text)
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


def truth(run: Trajectory, found: Found) -> list[tuple[str, str, str]] | None:
    """How well groups recover what the task planted: measure, value and what it means; None where it planted none."""
    if not run.has("samples/truth"):
        return None
    known = agreement.agreement(run, found.clusters)

    def of(value: float | None) -> str:
        return words.number(value) if value is not None else "\N{EN DASH}"

    return [
        ("Adjusted Rand index", of(known["adjusted_rand_index"]),
         "Of the sides of all planted samples, those in no group counting as one more: 1 is all right, 0 is chance."),
        ("The same of those mined", of(known["adjusted_rand_index_mined"]), "Of the planted samples that were mined."),
        ("Pairs found", of(known["pair_recall"]), "Share of the planted pairs both of whose sides are established."),
        ("Pairs right", of(known["pair_precision"]),
         "Share of the established pairs with a planted side that set two sides of one planted feature apart."),
        ("Joined right", of(known["joined_right"]), "Share of those that joined which are on their group's side."),
        ("Planted samples", f"{known['planted']:,}",
         f"{known['planted_mined']:,} were mined, {known['planted_grouped']:,} are in a group; "
         f"{known['other_grouped']:,} that were not planted are in one as well."),
    ]  # fmt: skip
