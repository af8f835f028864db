"""Opposing pairs as the page shows them: samples of both sides, their curves, their evidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opsig_cli.report import words
from opsig_cli.report.charts import Chart, Line, line_chart
from opsig_cli.report.samples import Samples, Shown, strongest
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.comparing import Series
from opsig_cli.studies.drawing import PAIR_TILES, close_up
from opsig_cli.studies.numbers import in_unit, loss_unit
from opsig_cli.trajectory.file import Trajectory

LINES = 12
"""Lines of text of each side of a pair."""
COMMON = 5
"""Labels of a group that are counted by name."""


@dataclass(frozen=True)
class Side:
    """One group of a pair: its number, its members in words, the most aligned of them, its mix of labels, and how its
    mean loss changed at a step."""

    group: int
    name: str
    size: int
    joined: int
    shown: list[Shown]
    mix: list[tuple[str, int, float]]
    change: float
    step: int


@dataclass(frozen=True)
class Pair:
    """A pair with its samples, its curves and its evidence; `record` is what `cluster` prints."""

    record: Mapping[str, Any]
    established: bool
    sides: tuple[Side, Side]
    charts: list[Chart]
    evidence: list[words.Evidence]


def show_pair(run: Trajectory, clusters: Clusters, samples: Samples, loss: Series, record: Mapping[str, Any]) -> Pair:
    """One pair: `record` as `cluster` prints it, `loss` that of all samples."""
    members = [clusters.grouping.members(group - 1) for group in record["groups"]]
    means = [run.series("losses/loss", clusters.position[m]).mean(1, dtype=np.float64) for m in members]
    names = _names(record)
    lines = [Line(name, mean, style) for name, mean, style in zip(names, means, ("a", "b"), strict=True)]
    lines.append(Line("all samples", loss.values, "whole dashed"))
    apart, unit = record["apart_step"], loss_unit(run)
    if apart is not None:
        samples = samples.around(int(loss.steps[np.searchsorted(loss.steps, apart) - 1]), apart)
    return Pair(
        record, record["verdict"] == "established",
        (_side(clusters, samples, record, 0), _side(clusters, samples, record, 1)),
        _pair_charts(loss.steps, lines, record, in_unit("loss", unit)), words.pair_evidence(record, unit),
    )  # fmt: skip


def _names(record: Mapping[str, Any]) -> list[str]:
    return [
        f"G{group}: {describe(mix, size)}"
        for group, mix, size in zip(record["groups"], record["labels"], record["sizes"], strict=True)
    ]


def _pair_charts(steps: np.ndarray, lines: list[Line], record: Mapping[str, Any], axis: str) -> list[Chart]:
    """All steps, and those around where the sides move apart most."""
    apart = record["apart_step"]
    centre = record["rise_step"] if apart is None else apart
    named = words.change_at(steps, lines[-1].values, centre) if apart is None else f"move apart most, step {apart}"
    near = close_up(steps, centre)
    about = f"Mean losses of the two groups of pair {record['pair']} and of all samples, steps"
    whole = line_chart(
        steps, lines, axis, f"{about} {steps[0]} to {steps[-1]}.", band=near,
        band_name="steps of the close-up", mark=centre, mark_name=named,
    )  # fmt: skip
    close = (steps >= near[0]) & (steps <= near[1])
    if close.all() or close.sum() < 3:
        return [replace(whole, band=None)]
    cut = [replace(line, values=line.values[close]) for line in lines]
    zoomed = line_chart(steps[close], cut, axis, f"{about} {near[0]} to {near[1]}.", mark=centre,
                        mark_name=f"step {centre}")  # fmt: skip
    return [whole, zoomed]


def _side(clusters: Clusters, samples: Samples, record: Mapping[str, Any], side: int) -> Side:
    group, size, mix = record["groups"][side], record["sizes"][side], record["labels"][side]
    shown = samples.show(strongest(clusters, group - 1, PAIR_TILES))
    if any(one.text for one in shown):
        shown = shown[:LINES]
    return Side(
        group, describe(mix, size), size, record["joined"][side], shown, _mix(mix, size),
        float((record["apart_changes"] or record["changes"])[side]),
        record["rise_step"] if record["apart_step"] is None else record["apart_step"],
    )  # fmt: skip


def _mix(mix: Mapping[str, int] | None, size: int) -> list[tuple[str, int, float]]:
    """Label, count and share of a group's commonest labels; the others together last."""
    common = list((mix or {}).items())[:COMMON]
    rest = size - sum(count for _, count in common)
    if common and rest:
        common.append((f"{len(mix or {}) - COMMON} other labels", rest))
    return [(label, count, count / size) for label, count in common]
