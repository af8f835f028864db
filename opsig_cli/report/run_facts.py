"""What the page says of the run: how it was trained, its loss over steps, and the curvature that the file holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsig_cli.report import words
from opsig_cli.report.charts import Chart, Line, line_chart
from opsig_cli.studies.clustering.window import Window
from opsig_cli.studies.comparing import Series
from opsig_cli.studies.curvature import PLACE, PRECONDITIONED, held_group
from opsig_cli.studies.numbers import loss_unit, with_unit
from opsig_cli.studies.trained import settings_of
from opsig_cli.trajectory.file import Trajectory

ROUGH = 1e-2
"""Residual above which an eigenvalue is said to be rough."""
RANKS = 5
"""Eigenvalues that are drawn."""


@dataclass(frozen=True)
class Curvature:
    """Eigenvalues over steps against the threshold, and what they say."""

    chart: Chart
    sentence: str | None
    rough: int
    ratio: float | None
    preconditioned: bool
    floor: bool


def facts(run: Trajectory, series: Mapping[str, Series]) -> list[tuple[str, str]]:
    """What the file says of the run, by name."""
    settings, attributes = settings_of(run), run.attributes
    steps = run.steps("losses")
    found: list[tuple[str, Any]] = []
    if settings is not None:
        found += [
            ("Task", settings.task), ("Model", settings.model or "the task's own"),
            ("Optimizer", f"{settings.optimizer}, {settings.batches}"),
            ("Learning rate", f"{settings.learning_rate:g}"),
            ("Seed", settings.seed),
        ]  # fmt: skip
    elif attributes.get("task"):
        found.append(("Task", attributes["task"]))
    found.append(("Steps with losses", f"{len(steps):,}, from {steps[0]:,} to {steps[-1]:,}"))
    found.append(("Samples", f"{len(run.samples):,}"))
    if run.has("checkpoints/params"):
        frozen = f" trained, {run.shape('frozen/params')[0]:,} frozen" if run.has("frozen/params") else ""
        found.append(("Parameters", f"{run.shape('checkpoints/params')[1]:,}{frozen}"))
    found.append(("Checkpoints", f"{len(run.steps('checkpoints')):,}"))
    if "loss" in series:
        found.append(("Last loss", with_unit(words.nats(series["loss"].last), loss_unit(run))))
    if "accuracy" in series:
        found.append(("Last accuracy", words.percent(series["accuracy"].last)))
    for name, key in (("Device", "device"), ("Recorded by", "opsig_version"), ("State", "state")):
        if attributes.get(key):
            found.append((name, f"opsig {attributes[key]}" if key == "opsig_version" else attributes[key]))
    return [(name, str(value)) for name, value in found]


def loss_chart(loss: Series, window: Window, rise: int, axis: str) -> Chart:
    """The loss of all samples (T,) with the window and its largest rise; `axis`: what it is, with its unit."""
    steps, named = window.steps_T, words.change_at(loss.steps, loss.values, rise)
    return line_chart(
        loss.steps, [Line("all samples", loss.values, "whole")], axis,
        f"Mean loss of all samples over steps {loss.steps[0]} to {loss.steps[-1]}; {named}.",
        band=(int(steps[0]), int(steps[-1])), band_name="window of the evidence", mark=rise,
        mark_name=named,
    )  # fmt: skip


def larger_rise(loss: Series, rise: int) -> int | None:
    """The step where the whole loss rose most, where that is another one than in the window."""
    finite = np.where(np.isfinite(loss.values), loss.values, np.nan)
    rises = np.nan_to_num(np.diff(finite), nan=-np.inf)
    row = int(rises.argmax()) + 1
    here = int(np.searchsorted(loss.steps, rise))
    return int(loss.steps[row]) if rises[row - 1] > max(0.0, rises[here - 1]) else None


def curvature_of(run: Trajectory, rise: int) -> Curvature | None:
    """The sharpness that the file holds, and what it is near the largest rise; None where the file holds none."""
    plain = "sharpness" if run.has("sharpness/eigenvalue") and len(run.steps("sharpness")) else None
    group = held_group(run) or plain
    if group is None:
        return None
    floor = PLACE[group] == "floor"
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
        for rank, column in enumerate(values.T[:RANKS])
    ]
    if np.isfinite(threshold).any():
        lines.append(Line("stability threshold", threshold, "whole dashed"))
    ratios = values[:, 0] / threshold
    ratio = float(np.nanmax(ratios)) if np.isfinite(ratios).any() else None
    sentence = words.curvature_sentence(steps.tolist(), values[:, 0].tolist(), threshold.tolist(), rise, floor)
    where = " at the floor of the valley" if floor else ""
    told = f"Top Hessian eigenvalues{where} over steps. {sentence or ''}"
    chart = line_chart(steps, lines, "sharpness", told, log=False)
    return Curvature(chart, sentence, rough, ratio, PRECONDITIONED[group], floor)
