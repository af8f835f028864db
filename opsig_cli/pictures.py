"""What `mine` and `cluster` draw: tiles and curves gathered from a trajectory, handed to `opsig_cli.figures`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from opsig_cli import movers as finding
from opsig_cli.analysis.density import smoothed_density
from opsig_cli.figures.alignment import alignment_block
from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.pages import PairPanel, movers_figure, pairs_figure
from opsig_cli.groups import Clusters, describe
from opsig_cli.movers import Movers
from opsig_cli.trajectory import Trajectory

TILES = 20
"""Pictures on a sheet of mined samples."""
PAIR_TILES = 15
"""Pictures of each group of a pair."""
ZOOM = 40
"""Steps of the close-up."""


def draw_movers(path: Path, run: Trajectory, movers: Movers, records: list[dict[str, Any]]) -> None:
    """Save the mined samples whose loss rose, those whose loss fell, and their mean losses against the whole loss."""
    sheets, curves = [], {}
    pictures = Pictures(run)
    stop = movers.first + len(movers.movement.mean_T)
    first, stop, steps, whole = _curve_rows(run, movers, stop)
    for direction, title in (("up", "loss rose"), ("down", "loss fell")):
        chosen = [rank for rank, record in enumerate(records) if record["direction"] == direction]
        tiles = [
            pictures.tile(
                int(movers.position[rank]), records[rank]["prediction_before"], records[rank]["prediction_after"],
                f"step {records[rank]['step']}",
            )
            for rank in chosen[:TILES]
        ]  # fmt: skip
        sheets.append((f"{title}: {len(chosen)} samples", tiles))
        if chosen:
            positions = movers.position[chosen[:TILES]]
            curves[title] = run.series("losses/loss", positions, first, stop).mean(1)
    centre = int(np.median(run.steps("losses")[movers.row]))
    title = f"{Path(run.path).name}: samples that move most, by {movers.score_name}"
    movers_figure(path, sheets, steps, curves, whole, _zoom(steps, centre), title)


def draw_pairs(path: Path, run: Trajectory, clusters: Clusters, records: list[dict[str, Any]]) -> None:
    """Save every opposing pair: the two groups' pictures, and their mean losses against the whole loss."""
    pictures = Pictures(run)
    window, found = clusters.window, clusters.grouping
    centre = int(window.steps_T[window.rise_row])
    before, after = (_predictions(run, step) for step in (centre - 1, centre))
    panels = []
    for record in records:
        if record["kind"] != "pair":
            continue
        groups = [group - 1 for group in record["groups"]]
        sides = []
        for group, size, mix in zip(groups, record["sizes"], record["labels"], strict=True):
            members = found.members(group)
            strongest = members[np.argsort(-found.alignment_M[members], kind="stable")][:PAIR_TILES]
            tiles = [
                pictures.tile(p, pictures.name(before, p), pictures.name(after, p))
                for p in clusters.position[strongest].tolist()
            ]
            sides.append((f"G{group + 1}: {describe(mix, size)}", tiles, clusters.losses_TM[:, members].mean(1)))
        across, together = record["opposition"], record["loss_correlation"]
        title = f"pair {record['pair']}: similarity {across:.2f}, loss changes correlate {together:.2f}"
        panels.append(PairPanel(title, *sides))
    whole = np.concatenate(
        [rows.mean(1, dtype=np.float64) for _, rows in run.blocks("losses/loss", window.first, window.stop)]
    )
    title = f"{Path(run.path).name}: opposing pairs"
    mixes = {record["group"]: [] for record in records if record["kind"] == "member"}
    for record in records:
        if record["kind"] == "member":
            mixes[record["group"]].append(record["label"])
    names = [f"G{group} {max(set(labels), key=labels.count) or ''}" for group, labels in sorted(mixes.items())]
    matrix = alignment_block(clusters.similarity_MM, found.group_M, names, found.pairs())
    pairs_figure(path, panels, window.steps_T, whole, title, _zoom(window.steps_T, centre), matrix if names else [])


def draw_curvature(path: Path, run: Trajectory, records: list[dict[str, Any]]) -> None:
    """Save what `sharpness` measured: eigenvalues, metrics of samples or of the whole loss, or a slice."""
    from opsig_cli.figures import curvature

    name = Path(run.path).name
    if records and "losses" in records[0]:
        curves = {group: np.array([r["losses"][group] for r in records]) for group in records[0]["losses"]}
        positions = np.array([r["position"] for r in records])
        curvature.slice_page(
            path, positions, curves, f"{name}: losses along the top eigenvector at step {records[0]['step']}"
        )
    elif records and "eigenvalue" in records[0]:
        steps = np.array([r["step"] for r in records if r["rank"] == 1])
        ranks = max(r["rank"] for r in records)
        values = np.array([r["eigenvalue"] for r in records]).reshape(len(steps), ranks)
        threshold = np.array([r["threshold"] or np.nan for r in records if r["rank"] == 1], float)
        shares = [r.get("layer_fraction", {}) for r in records if r["rank"] == 1]
        layers = {layer: np.array([share.get(layer, np.nan) for share in shares]) for layer in shares[0]}
        curvature.sharpness_page(path, steps, values, threshold, layers, f"{name}: sharpness")
    elif records and "sample" in records[0]:
        metrics = [key for key in records[0] if key not in ("trajectory", "step", "sample", "set")]
        steps = sorted({r["step"] for r in records})
        sets = list(dict.fromkeys(r["set"] for r in records))
        panels = []
        for metric in metrics:
            by_set = {
                group: np.array([r[metric] for r in records if r["set"] == group]).reshape(len(steps), -1)
                for group in sets
            }
            panels.append((metric, np.array(steps), by_set))
        curvature.samples_page(path, panels, f"{name}: curvature of single samples")
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
        curvature.loss_page(path, panels, f"{name}: curvature of the whole loss")
    else:
        raise ValueError("there is nothing to draw: no step was measured")


def draw_probe(path: Path, run: Trajectory, records: list[dict[str, Any]]) -> None:
    """Save what `probe` measured: inputs through the checkpoints, or projected iterates."""
    from opsig_cli.figures import probed

    name = Path(run.path).name
    if "projection" in records[0]:
        runs = {}
        for other in dict.fromkeys(r["trajectory"] for r in records):
            rows = [r for r in records if r["trajectory"] == other]
            effective = np.array([r.get("effective_step", np.nan) for r in rows])
            runs[Path(other).name] = (
                np.array([r["step"] for r in rows]), np.array([r["projection"] for r in rows]),
                effective if np.isfinite(effective).any() else None,
            )  # fmt: skip
        title = f"along the top eigenvector of {name} at step {records[0]['crossing_step']}"
        probed.projection_page(path, runs, records[0]["crossing_step"], title)
        return
    steps = np.array(sorted({r["step"] for r in records}))
    probes = {}
    for chosen in dict.fromkeys(r["input"] for r in records):
        rows = [r for r in records if r["input"] == chosen]
        norms = np.array([np.nan if r["feature_norm"] is None else r["feature_norm"] for r in rows])
        probes[chosen] = (np.stack([r["probabilities"] for r in rows]), norms)
    first = next(iter(probes))
    mean = np.array([r["mean_feature_norm"] or np.nan for r in records if r["input"] == first], float)
    names = run.read("class_name").tolist() if run.has("class_name") else None
    classes = names or [str(i) for i in range(len(records[0]["logits"]))]
    probed.probe_page(path, steps, probes, mean, classes, f"{name}: probes")


class Pictures:
    """What a person sees of each sample: its picture or text, its label, and names for its predictions."""

    def __init__(self, run: Trajectory):
        self._pictures = next((run.read(n) for n in ("samples/thumbnail", "samples/text") if run.has(n)), None)
        self._labels = run.read("samples/label") if run.has("samples/label") else None
        self._names = run.read("class_name") if run.has("class_name") else None

    def tile(self, position: int, before: Any, after: Any, caption: str = "") -> Tile:
        """The tile of the sample in this column."""
        picture = None if self._pictures is None else self._pictures[position]
        label = None if self._labels is None else str(self._labels[position])
        was, now = (None if name is None else str(name) for name in (before, after))
        return Tile(str(picture) if isinstance(picture, str) else picture, label, was, now, caption)

    def name(self, predictions: np.ndarray | None, position: int) -> Any:
        """The predicted class of the sample in this column."""
        return None if predictions is None else finding.class_name(self._names, predictions[position])


def _predictions(run: Trajectory, step: int) -> np.ndarray | None:
    if not run.has("losses/prediction") or step not in run.steps("losses"):
        return None
    return run.row("losses/prediction", step)


def _curve_rows(run: Trajectory, movers: Movers, stop: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Rows to draw, their steps and the whole loss: those mined, or all of the run around a single step."""
    steps = run.steps("losses")
    if len(movers.movement.mean_T) > 2:
        return movers.first, stop, steps[movers.first : stop], movers.movement.mean_T
    whole = np.concatenate([rows.mean(1, dtype=np.float64) for _, rows in run.blocks("losses/loss")])
    return 0, len(steps), steps, whole


def _zoom(steps: np.ndarray, centre: int) -> tuple[int, int]:
    """A close-up of ZOOM steps around the centre, inside the steps there are."""
    first = max(int(steps[0]), min(centre - ZOOM // 2, int(steps[-1]) - ZOOM))
    return first, min(first + ZOOM, int(steps[-1]))
