"""What stands in the report, gathered from a trajectory and from what `cluster` found. T steps, G groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli import cluster_records, comparing, movers
from opsig_cli.clustering import Found
from opsig_cli.curvature import group_of, settings_of
from opsig_cli.groups import Clusters
from opsig_cli.pictures import PAIR_TILES, close_up
from opsig_cli.report import words
from opsig_cli.report.charts import Chart, Line, line_chart
from opsig_cli.report.images import matrix_image, spread_names
from opsig_cli.report.samples import Samples, Shown, strongest
from opsig_cli.trajectory import Trajectory

PAIRS = 8
"""Pairs that are shown with their samples; all are in the overview."""
LINES = 12
"""Lines of text of each side of a pair."""
FEW = 6
"""Samples shown of a group that nothing opposes."""
ALONE = 12
"""Groups that nothing opposes, the largest movement first."""
MOVERS = 20
CONTRIBUTIONS = 10
"""Groups whose part of the rise is shown."""
MEMBERS = 20
"""Members of each group in the table."""
BLOCKS = 18
"""Groups in the table of mean similarities."""
ROUGH = 1e-2
"""Residual above which an eigenvalue is said to be rough."""


@dataclass(frozen=True)
class Side:
    """One group of a pair: its number, its members in words, the most aligned of them, and its mix of labels."""

    group: int
    name: str
    size: int
    joined: int
    shown: list[Shown]
    mix: list[tuple[str, int, float]]
    change: float


@dataclass(frozen=True)
class Pair:
    """A pair with its samples, its curves and its evidence; `record` is what `cluster` prints."""

    record: Mapping[str, Any]
    significant: bool
    sides: tuple[Side, Side]
    charts: list[Chart]
    evidence: list[words.Evidence]


def gather(
    run: Trajectory, found: Found, records: Sequence[Mapping[str, Any]], task: str | None, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that the template names, from the groups found and the records `cluster` would print of them.

    `warnings`: what was said while the task was opened.
    """
    clusters, window = found.clusters, found.clusters.window
    pairs = words.by_strength([record for record in records if record["kind"] == "pair"])
    groups = [record for record in records if record["kind"] == "group"]
    held = words.significant(pairs)
    series = comparing.series_of(run)
    loss = series["loss"] if "loss" in series else comparing.tracked(run)["loss"]
    rise, previous = (int(window.steps_T[row]) for row in (window.rise_row, window.rise_row - 1))
    means = dict(zip(loss.steps.tolist(), loss.values.tolist(), strict=True))
    samples = Samples(run, previous, rise)
    explained = cluster_records.explain(run, clusters, rise)
    curvature = curvature_of(run, rise)
    shown = [_pair(run, clusters, samples, loss, pair) for pair in pairs[:PAIRS]]
    has = {
        "checkpoints": bool(len(run.steps("checkpoints"))), "prediction": run.has("losses/prediction"),
        "label": run.has("samples/label"), "picture": run.has("samples/thumbnail") or run.has("samples/text"),
    }  # fmt: skip
    notes = [*warnings, *(note for note in found.notes if note != found.movers.note)]
    attributes = run.attributes
    return {
        "name": Path(run.path).name,
        "answer": words.answer(pairs, groups, len(clusters.position)),
        "strongest": pairs[0]["sentence"] if held else None,
        "rise": words.rise_sentence(
            rise, means[previous], means[rise], _movement(explained, held), len(held), _elsewhere(loss, rise)
        ),
        "rise_step": rise,
        "note": found.movers.note,
        "tiles": _tiles(pairs, held, explained, rise, means[rise] - means[previous], curvature),
        "facts": facts(run, series),
        "loss": _loss_chart(loss, clusters, rise),
        "curvature": curvature,
        "contributions": _contributions(explained, pairs),
        "pairs": shown,
        "linked": [pair.record["pair"] for pair in shown],
        "overview": [(pair, pair["p_value"] < words.SIGNIFICANT) for pair in pairs],
        "alone": _alone(clusters, samples, groups),
        "alone_count": sum(group["pair"] is None for group in groups),
        "movers": _movers(run, found, samples),
        "matrix": _matrix(clusters, groups) if groups else None,
        "members": _members(run, window, records, samples),
        "limits": words.limits(pairs, len(held), clusters.by, has, notes, attributes.get("state")),
        "commands": words.commands(
            run.path, clusters.by, task, attributes.get("command"), pairs[0]["pair"] if pairs else None,
            has["checkpoints"],
        ),
        "by": clusters.by,
        "has": has,
        "w": words,
    }  # fmt: skip


def facts(run: Trajectory, series: Mapping[str, comparing.Series]) -> list[tuple[str, str]]:
    """What the file says of the run, by name."""
    settings, attributes = settings_of(run), run.attributes
    steps = run.steps("losses")
    found: list[tuple[str, Any]] = []
    if settings is not None:
        batch = "full batch" if settings.batch_size is None else f"batches of {settings.batch_size:,}"
        found += [
            ("Task", settings.task), ("Model", settings.model or "the task's own"),
            ("Optimizer", f"{settings.optimizer}, {batch}"), ("Learning rate", f"{settings.learning_rate:g}"),
            ("Seed", settings.seed),
        ]  # fmt: skip
    elif attributes.get("task"):
        found.append(("Task", attributes["task"]))
    found.append(("Steps with losses", f"{len(steps):,}, from {steps[0]:,} to {steps[-1]:,}"))
    found.append(("Samples", f"{len(run.samples):,}"))
    if run.has("checkpoints/params"):
        found.append(("Parameters", f"{run.shape('checkpoints/params')[1]:,}"))
    found.append(("Checkpoints", f"{len(run.steps('checkpoints')):,}"))
    if "loss" in series:
        found.append(("Last loss, in nats", words.nats(series["loss"].last)))
    if "accuracy" in series:
        found.append(("Last accuracy", words.percent(series["accuracy"].last)))
    for name, key in (("Device", "device"), ("Recorded by", "opsig_version"), ("State", "state")):
        if attributes.get(key):
            found.append((name, f"opsig {attributes[key]}" if key == "opsig_version" else attributes[key]))
    return [(name, str(value)) for name, value in found]


@dataclass(frozen=True)
class Curvature:
    """Eigenvalues over steps against the threshold, and what they say."""

    chart: Chart
    sentence: str | None
    rough: int
    ratio: float | None
    preconditioned: bool


def curvature_of(run: Trajectory, rise: int) -> Curvature | None:
    """The sharpness that the file holds, and what it is near the largest rise; None where the file holds none."""
    group = group_of(settings_of(run))
    if not run.has(f"{group}/eigenvalue"):
        group = "sharpness"
    if not run.has(f"{group}/eigenvalue") or not len(run.steps(group)):
        return None
    steps = run.steps(group)
    values = run.rows(f"{group}/eigenvalue", 0, len(steps))
    threshold = np.full(len(steps), np.nan)
    if run.has(f"{group}/threshold"):
        threshold = run.rows(f"{group}/threshold", 0, len(steps))
    threshold = np.where(np.isfinite(threshold), threshold, np.nan)
    rough = 0
    if run.has(f"{group}/residual"):
        rough = int((run.rows(f"{group}/residual", 0, len(steps))[:, 0] > ROUGH).sum())
    lines = [
        Line("top eigenvalue" if rank == 0 else f"eigenvalue {rank + 1}", column, "a" if rank == 0 else "faint")
        for rank, column in enumerate(values.T[:5])
    ]
    if np.isfinite(threshold).any():
        lines.append(Line("stability threshold", threshold, "whole dashed"))
    ratios = values[:, 0] / threshold
    ratio = float(np.nanmax(ratios)) if np.isfinite(ratios).any() else None
    sentence = words.curvature_sentence(steps.tolist(), values[:, 0].tolist(), threshold.tolist(), rise)
    chart = line_chart(steps, lines, "sharpness", f"Top Hessian eigenvalues over steps. {sentence or ''}", log=False)
    return Curvature(chart, sentence, rough, ratio, group == "preconditioned")


def _elsewhere(loss: comparing.Series, rise: int) -> int | None:
    """The step where the whole loss rose most, where that is another one than in the window."""
    rises = np.nan_to_num(np.diff(loss.values), nan=-np.inf, posinf=-np.inf)
    row = int(rises.argmax()) + 1
    here = int(np.searchsorted(loss.steps, rise))
    return int(loss.steps[row]) if rises[row - 1] > max(0.0, rises[here - 1]) else None


def _loss_chart(loss: comparing.Series, clusters: Clusters, rise: int) -> Chart:
    steps = clusters.window.steps_T
    return line_chart(
        loss.steps, [Line("all samples", loss.values, "whole")], "loss (nats)",
        f"Mean loss of all samples over steps {loss.steps[0]} to {loss.steps[-1]}. It rises most at step {rise}.",
        band=(int(steps[0]), int(steps[-1])), band_name="window of the evidence", mark=rise,
        mark_name=f"largest rise, step {rise}",
    )  # fmt: skip


def _pair(
    run: Trajectory, clusters: Clusters, samples: Samples, loss: comparing.Series, record: Mapping[str, Any]
) -> Pair:
    members = [clusters.grouping.members(group - 1) for group in record["groups"]]
    means = [run.series("losses/loss", clusters.position[m]).mean(1, dtype=np.float64) for m in members]
    names = _names(record)
    lines = [Line(name, mean, style) for name, mean, style in zip(names, means, ("a", "b"), strict=True)]
    lines.append(Line("all samples", loss.values, "whole dashed"))
    return Pair(
        record, record["p_value"] < words.SIGNIFICANT,
        (_side(clusters, samples, record, 0), _side(clusters, samples, record, 1)),
        _pair_charts(loss.steps, lines, clusters, record), words.pair_evidence(record),
    )  # fmt: skip


def _names(record: Mapping[str, Any]) -> list[str]:
    return [
        f"G{group}: {cluster_records.describe(mix, size)}"
        for group, mix, size in zip(record["groups"], record["labels"], record["sizes"], strict=True)
    ]


def _pair_charts(steps: np.ndarray, lines: list[Line], clusters: Clusters, record: Mapping[str, Any]) -> list[Chart]:
    rise = record["rise_step"]
    near = close_up(steps, rise)
    about = f"Mean losses of the two groups of pair {record['pair']} and of all samples, steps"
    whole = line_chart(
        steps, lines, "loss (nats)", f"{about} {steps[0]} to {steps[-1]}.", band=near,
        band_name="steps of the close-up", mark=rise, mark_name=f"largest rise, step {rise}",
    )  # fmt: skip
    close = (steps >= near[0]) & (steps <= near[1])
    if close.all() or close.sum() < 3:
        return [replace(whole, band=None)]
    cut = [replace(line, values=line.values[close]) for line in lines]
    zoomed = line_chart(steps[close], cut, "loss (nats)", f"{about} {near[0]} to {near[1]}.", mark=rise,
                        mark_name=f"step {rise}")  # fmt: skip
    return [whole, zoomed]


def _side(clusters: Clusters, samples: Samples, record: Mapping[str, Any], side: int) -> Side:
    group, size, mix = record["groups"][side], record["sizes"][side], record["labels"][side]
    shown = samples.show(strongest(clusters, group - 1, PAIR_TILES))
    if any(one.text for one in shown):
        shown = shown[:LINES]
    return Side(
        group, cluster_records.describe(mix, size), size, record["joined"][side], shown, _mix(mix, size),
        float(record["changes"][side]),
    )  # fmt: skip


def _mix(mix: Mapping[str, int] | None, size: int) -> list[tuple[str, int, float]]:
    """Label, count and share of a group's commonest labels; the others together last."""
    common = list((mix or {}).items())[:5]
    rest = size - sum(count for _, count in common)
    if common and rest:
        common.append((f"{len(mix or {}) - 5} other labels", rest))
    return [(label, count, count / size) for label, count in common]


def _movement(explained: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> float | None:
    """The part of all movement at the rise that members of the significant pairs carry, each group once."""
    groups = {group for pair in held for group in pair["groups"]}
    parts = [part["movement"] for part in explained if part["group"] in groups]
    return None if not parts or any(part is None or math.isnan(part) for part in parts) else sum(parts)


def _tiles(
    pairs: Sequence[Any], held: Sequence[Any], explained: Sequence[Mapping[str, Any]], rise: int, change: float,
    curvature: Curvature | None,
) -> list[tuple[str, str, str]]:  # fmt: skip
    """The few numbers under the answer: what, how much, and of what."""
    movement = _movement(explained, held)
    tiles = [
        ("Significant pairs", f"{len(held)} of {len(pairs)}" if pairs else "none", f"p < {words.SIGNIFICANT:g}"),
        ("Their share of movement", words.percent(movement) if held else "\N{EN DASH}", f"at step {rise}, up or down"),
        ("Largest rise of the loss" if change > 0 else "Smallest fall of the loss", words.nats(change, sign=True),
         f"nats, at step {rise}"),
    ]  # fmt: skip
    if curvature is not None and curvature.ratio is not None:
        tiles.append(
            ("Sharpness, at most", f"{curvature.ratio:.2f} \N{MULTIPLICATION SIGN}", "the stability threshold")
        )
    else:
        tiles.append(("Sharpness", "\N{EN DASH}", "no threshold known" if curvature else "not in this file"))
    return tiles


def _contributions(explained: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups' summed changes at the rise, the largest first, small ones together, and all other samples.

    `from`, `wide`: a bar in per cent, zero in the middle.
    """
    groups = [part for part in explained if part["group"] is not None]
    rows = [dict(part, name=f"G{part['group']}: {cluster_records.describe(part['labels'], part['size'])}")
            for part in groups[:CONTRIBUTIONS]]  # fmt: skip
    if small := groups[CONTRIBUTIONS:]:
        rows.append({
            "name": f"{len(small)} smaller groups", "size": sum(part["size"] for part in small),
            "change": sum(part["change"] for part in small), "mean_change": None, "pair": None,
            "share": _sum(part["share"] for part in small), "movement": _sum(part["movement"] for part in small),
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


def _alone(clusters: Clusters, samples: Samples, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    alone = sorted((group for group in groups if group["pair"] is None), key=lambda group: -group["movement"])
    return [
        dict(group, name=cluster_records.describe(group["labels"], group["size"]),
             shown=samples.show(strongest(clusters, group["group"] - 1, FEW)))
        for group in alone[:ALONE]
    ]  # fmt: skip


def _movers(run: Trajectory, found: Found, samples: Samples) -> list[dict[str, Any]]:
    """The samples whose loss moved most, as `mine` prints them, with what they look like."""
    first = replace(found.movers, position=found.movers.position[:MOVERS], row=found.movers.row[:MOVERS])
    return [
        dict(record, shown=samples.shown(int(position), record["prediction_before"], record["prediction_after"]))
        for record, position in zip(movers.records(run, first), first.position, strict=True)
    ]


def _matrix(clusters: Clusters, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The similarities in order of group as an image with its borders and names, and the mean of every two groups."""
    group_M, similarity_MM = clusters.grouping.group_M, clusters.similarity_MM
    members = [np.flatnonzero(group_M == group["group"] - 1) for group in groups]
    sizes = [len(m) for m in members]
    borders = (np.cumsum(sizes) / sum(sizes)).round(4).tolist()
    named = spread_names(sizes, 0.032)
    first = [0.0, *borders]
    chosen = sorted(sorted(range(len(groups)), key=lambda g: (groups[g]["pair"] is None, -sizes[g]))[:BLOCKS])
    pairs = {frozenset((a, b)) for a, b in clusters.grouping.pairs()}
    means = [[float(similarity_MM[np.ix_(members[a], members[b])].mean()) for b in chosen] for a in chosen]
    return {
        "image": matrix_image(similarity_MM, np.concatenate(members)),
        "count": sum(sizes),
        "borders": borders[:-1],
        "names": [(f"G{groups[g]['group']}", round((first[g] + first[g + 1]) / 2, 4)) for g in named],
        "groups": [groups[g]["group"] for g in chosen],
        "labels": [cluster_records.describe(groups[g]["labels"], sizes[g]) for g in chosen],
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


def _members(run: Trajectory, window, records: Sequence[Mapping[str, Any]], samples: Samples) -> list[dict[str, Any]]:
    """The most aligned members of every group, each once, with the pairs that its group is in and how its loss changed
    at the rise."""
    rows: dict[int, dict[str, Any]] = {}
    for record in (record for record in records if record["kind"] == "member"):
        row = rows.setdefault(record["sample"], dict(record, pairs=[]))
        if record["pair"] is not None:
            row["pairs"].append(record["pair"])
    before, after = run.rows("losses/loss", window.first + window.rise_row - 1, window.first + window.rise_row + 1)
    place = {int(sample): position for position, sample in enumerate(run.samples.tolist())}
    kept: dict[int, list[dict[str, Any]]] = {}
    for row in sorted(rows.values(), key=lambda row: (row["group"], -row["alignment"])):
        if len(kept.setdefault(row["group"], [])) < MEMBERS:
            position = place[row["sample"]]
            row["change"] = float(after[position]) - float(before[position])
            (row["shown"],) = samples.show([position])
            kept[row["group"]].append(row)
    return [row for group in kept.values() for row in group]
