"""Curves without samples' pictures: what `sharpness`, `probe`, `compare` and `branch` draw with `opsig_cli.figures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.analysis.density import smoothed_density
from opsig_cli.studies.branching.effects import Line, Panel
from opsig_cli.studies.comparing import QUANTITIES, Series
from opsig_cli.studies.curvature import SAMPLE_METRICS
from opsig_cli.studies.numbers import in_unit, loss_unit, percent
from opsig_cli.trajectory.file import Trajectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def titled(run: Trajectory, steps: Sequence[int] | np.ndarray, what: str) -> str:
    """A picture's title: of which run, which steps, and what it shows."""
    return f"{Path(run.path).name}, {spanned(steps)}: {what}"


def spanned(steps: Sequence[int] | np.ndarray) -> str:
    """Steps in words, by the first and the last.

    >>> spanned([0, 10, 400]), spanned([7])
    ('steps 0 to 400', 'step 7')
    """
    first, last = (int(steps[0]), int(steps[-1])) if len(steps) else (0, 0)
    return f"step {first}" if first == last else f"steps {first} to {last}"


def draw_curvature(run: Trajectory, records: list[dict[str, Any]], names: Mapping[str, str] | None = None) -> Figure:
    """What `sharpness` measured: eigenvalues, metrics of samples or of the whole loss, or a slice; `names`: of its
    groups."""
    from opsig_cli.figures import curvature

    if records and "losses" in records[0]:
        curves = {
            str((names or {}).get(group, group)): np.array([r["losses"][group] for r in records])
            for group in records[0]["losses"]
        }
        positions = np.array([r["position"] for r in records])
        title = titled(run, [records[0]["step"]], "losses along the whole loss's top eigenvector")
        return curvature.slice_page(positions, curves, title, in_unit("mean loss", loss_unit(run)))
    elif records and "eigenvalue" in records[0]:
        steps = np.array([r["step"] for r in records if r["rank"] == 1])
        ranks = max(r["rank"] for r in records)
        values = np.array([r["eigenvalue"] for r in records]).reshape(len(steps), ranks)
        threshold = np.array([r["threshold"] or np.nan for r in records if r["rank"] == 1], float)
        shares = [r.get("layer_fraction", {}) for r in records if r["rank"] == 1]
        layers = {layer: np.array([share.get(layer, np.nan) for share in shares]) for layer in shares[0]}
        where = " at the floor of the valley" if records[0]["at"] == "floor" else ""
        what = f"the Hessian's largest eigenvalue{'s' * (ranks > 1)}{where}"
        return curvature.sharpness_page(steps, values, threshold, layers, titled(run, steps, what))
    elif records and "sample" in records[0]:
        metrics = [key for key in records[0] if key in SAMPLE_METRICS]
        steps = sorted({r["step"] for r in records})
        sets = list(dict.fromkeys(r["set"] for r in records))
        panels = []
        for metric in metrics:
            by_set = {
                group: np.array([r[metric] for r in records if r["set"] == group]).reshape(len(steps), -1)
                for group in sets
            }
            panels.append((metric, np.array(steps), by_set))
        what = " and ".join(metric.replace("_", " ") for metric in metrics)
        return curvature.samples_page(panels, titled(run, steps, f"{what} of single samples"))
    elif records:
        steps = np.array([r["step"] for r in records])
        panels = []
        if "critical_sharpness" in records[0]:
            keys = ("critical_sharpness", "threshold")
            panels.append(
                curvature.critical_panel(steps, *(np.array([r[key] for r in records], float) for key in keys))
            )
        if "trace" in records[0]:
            keys = ("trace", "trace_error")
            panels.append(curvature.trace_panel(steps, *(np.array([r[key] for r in records]) for key in keys)))
            last = records[-1]
            density = smoothed_density(last["density_nodes"], last["density_weights"])
            panels.append(curvature.density_panel(last["step"], *density))
        return curvature.loss_page(panels, titled(run, steps, "curvature of the whole loss"))
    else:
        raise ValueError("there is nothing to draw: no step was measured")


def draw_probe(runs: Sequence[Trajectory], records: list[dict[str, Any]], shown: np.ndarray) -> Figure:
    """Inputs (N, H, W, C) through the checkpoints of one or more runs."""
    from opsig_cli.figures import probed

    names = runs[0].read("class_name").tolist() if runs[0].has("class_name") else None
    classes = names or [str(i) for i in range(len(records[0]["logits"]))]
    panels = []
    for number, chosen in enumerate(dict.fromkeys(r["input"] for r in records)):
        series = []
        for run in runs:
            rows = [r for r in records if r["input"] == chosen and r["trajectory"] == run.path]
            columns = ("step", "time", "feature_norm", "mean_feature_norm", "logits", "probabilities")
            values = {key: np.array([np.nan if r[key] is None else r[key] for r in rows], float) for key in columns}
            swinging = np.array([r["oscillating"] is True for r in rows])
            series.append(probed.Probe(_run_name(run.path), swinging=swinging, **values))
        panels.append((chosen, shown[number], series))
    steps = sorted({r["step"] for r in records})
    what = "what the network makes of " + ", ".join(name for name, *_ in panels)
    return probed.probe_page(panels, classes, titled(runs[0], steps, what))


def draw_projection(run: Trajectory, records: list[dict[str, Any]]) -> Figure:
    """Iterates of runs along the first one's eigenvector, and Adam's effective steps."""
    from opsig_cli.figures import probed

    lines = []
    for summary in (r for r in records if r["kind"] == "summary"):
        rows = [r for r in records if r["kind"] == "iterate" and r["trajectory"] == summary["trajectory"]]
        columns = ("step", "projection", "effective_step", "step_size_along")
        values = {key: np.array([r.get(key, np.nan) for r in rows], float) for key in columns}
        share = summary["reversals"]
        words = "" if share is None else f": {percent(share)} of steps reverse"
        lines.append(probed.Projection(f"{_run_name(summary['trajectory'])}{words}", **values))
    crossing = records[0]["crossing_step"]
    steps = sorted({r["step"] for r in records if r["kind"] == "iterate"})
    title = titled(run, steps, f"iterates along its top eigenvector at step {crossing}, where it crosses the threshold")
    return probed.projection_page(lines, crossing, title)


def draw_compared(runs: Sequence[Trajectory], series: Sequence[Mapping[str, Series]]) -> Figure:
    """What runs have, one panel a quantity that any of them has."""
    from opsig_cli.figures.compared import compared_page

    names = [_run_name(run.path) for run in runs]
    if len(set(names)) < len(names):
        names = [run.path for run in runs]
    panels = []
    for quantity, axis in QUANTITIES.items():
        have = {name: found[quantity] for name, found in zip(names, series, strict=True) if quantity in found}
        if have:
            axis = in_unit(axis, loss_unit(runs[0])) if quantity == "loss" else axis
            panels.append((quantity, axis, {name: (line.steps, line.values) for name, line in have.items()}))
    every = [line.steps for found in series for line in found.values() if len(line.steps)]
    steps = [min(int(s[0]) for s in every), max(int(s[-1]) for s in every)] if every else []
    listed = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return compared_page(panels, names, f"{listed}, {spanned(steps)}: laid over each other")


def draw_branches(panels: Sequence[Panel], run: str, unit: str = "") -> Figure:
    """Every branch of a run over the unchanged future and its controls; `unit`: of the losses."""
    from opsig_cli.figures.branched import branches_page

    def drawn(line: Line) -> tuple[str, np.ndarray, np.ndarray]:
        return line.of, line.steps, line.values

    steps = np.concatenate([panel.unchanged.steps for panel in panels])
    return branches_page(
        [(p.title, drawn(p.branch), drawn(p.unchanged), [drawn(line) for line in p.controls]) for p in panels],
        f"{_run_name(run)}, {spanned([steps.min(), steps.max()])}: what would have happened", in_unit("loss", unit),
    )  # fmt: skip


def _run_name(path: str) -> str:
    return Path(path).name
