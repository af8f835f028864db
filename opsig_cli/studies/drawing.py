"""Pictures of samples, with their losses, gathered from a trajectory and handed to `opsig_cli.figures`: what `mine`,
`cluster` and `sharpness --name` draw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from opsig_cli.analysis.group_means import between_groups
from opsig_cli.figures.alignment import alignment_block
from opsig_cli.figures.contact_sheet import Tile
from opsig_cli.figures.pages import PairPanel, movers_figure, pairs_figure
from opsig_cli.studies.clustering.clusters import Clusters
from opsig_cli.studies.clustering.neighbours import Near
from opsig_cli.studies.clustering.records import by_strength
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.filled import mean_losses
from opsig_cli.studies.mining import Movers
from opsig_cli.studies.numbers import in_unit, loss_unit, percent, plus_minus
from opsig_cli.studies.pictures import Pictures
from opsig_cli.studies.plotting import spanned, titled
from opsig_cli.studies.sighted import Sighted
from opsig_cli.trajectory import sightings
from opsig_cli.trajectory.file import Trajectory
from opsig_cli.trajectory.texts import clause

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILES = 20
"""Pictures on a sheet of mined samples."""
PAIR_TILES = 15
"""Pictures of each group of a pair."""
PANELS = 4
"""Pairs that are drawn, the established ones first, then by verdict those that move most; all are in the matrix."""
CHOSEN = 24
"""The same of pairs that were asked for by verdict or number."""
ZOOM = 40
"""Steps of the close-up."""


def draw_movers(run: Trajectory, movers: Movers, records: list[dict[str, Any]]) -> Figure:
    """The mined samples whose loss rose, those whose loss fell, and their mean losses against the whole loss."""
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
        sheets.append((title, tiles))
        if chosen:
            positions = movers.position[chosen[:TILES]]
            curves[title] = run.series("losses/loss", positions, first, stop).mean(1)
    centre = int(np.median(run.steps("losses")[movers.row]))
    recorded = run.steps("losses")
    looked = recorded[movers.first : movers.first + len(movers.movement.mean_T)]
    title = titled(run, looked, f"the {len(records)} samples that move most, by {movers.score_name}")
    said = "Of each sample: label, what it was taken for before and after its largest change, its index, and the step"
    said += f". {pictures.words}" if pictures.words else ""
    if len(looked) < len(recorded):
        said += f". The run has losses of {spanned(recorded)}"
    return movers_figure(
        sheets, steps, curves, whole, close_up(steps, centre), title, said, in_unit("loss", loss_unit(run))
    )


def draw_sighted(run: Trajectory, found: Sighted, records: list[dict[str, Any]]) -> Figure:
    """Mined sightings: the samples whose loss was above the expected, those below, and where each was seen, as points
    over the mean losses of batches and their trend."""
    from opsig_cli.figures.seen import Points, seen_figure

    pictures, ids = Pictures(run), run.samples
    sheets, points = [], []
    for direction, title in (("up", "above the expected"), ("down", "below the expected")):
        shown = [rank for rank, record in enumerate(records) if record["direction"] == direction]
        tiles = [
            pictures.tile(
                int(found.rows["place"][rank]), records[rank]["prediction_before"], records[rank]["prediction_after"],
                f"step {records[rank]['step']}",
            )
            for rank in shown[:TILES]
        ]  # fmt: skip
        sheets.append((f"{title}: {len(shown)} samples", tiles))
        if shown:
            seen = sightings.of_samples(run, ids[found.rows["place"][shown[:TILES]]])
            points.append(Points(title, seen.step, seen.loss.astype(np.float64)))
    centre = int(np.median(found.rows["step"])) if len(found.rows) else int(found.steps_T[-1])
    steps = sorted({record["step"] for record in records})
    what = f"rows of the batch of step {steps[0]}" if len(steps) == 1 else "samples seen in batches"
    title = f"{Path(run.path).name}: {what}, by {found.score_name}"
    return seen_figure(
        sheets, found.steps_T, found.means_T, found.trend.before, points, close_up(found.steps_T, centre), title
    )


def draw_pairs(
    run: Trajectory, clusters: Clusters, records: list[dict[str, Any]], count: int, chosen: bool = False
) -> Figure:
    """Every opposing pair: the two groups' pictures, and their mean losses against the whole loss.

    `count`: of all pairs; `chosen`: draw all those of the records, which were asked for, up to CHOSEN.
    """
    pictures = Pictures(run)
    window, found = clusters.window, clusters.grouping
    rise = int(window.steps_T[window.rise_row])
    steps = run.steps("losses")
    panels = []
    pairs = by_strength(record for record in records if record["kind"] == "pair")
    most = CHOSEN if chosen else PANELS
    for record in pairs[:most]:
        groups = [group - 1 for group in record["groups"]]
        centre = rise if record["apart_step"] is None else record["apart_step"]
        before, after = (predictions_at(run, step) for step in (centre - 1, centre))
        sides = []
        for group, size, mix in zip(groups, record["sizes"], record["labels"], strict=True):
            members = found.members(group)
            strongest = members[np.argsort(-found.alignment_M[members], kind="stable")][:PAIR_TILES]
            tiles = [
                pictures.tile(p, pictures.name(before, p), pictures.name(after, p))
                for p in clusters.position[strongest].tolist()
            ]
            mean = run.series("losses/loss", clusters.position[members]).mean(1, dtype=np.float64)
            sides.append((f"G{group + 1}: {describe(mix, size)}", tiles, mean))
        measure = "correlation of losses" if clusters.by == "loss" else "cosine"
        across = plus_minus(record["opposition"], record["opposition_error"])
        title = f"pair {record['pair']}, {record['verdict']}: {measure} {across}"
        if np.isfinite(record["alike"]):
            title += f", alike {record['alike']:.2f}"
        if record["swing_ratio"] is not None:
            title += f", R {record['swing_ratio']:.2f}"
        title += f", {percent(record['apart_movement'])} of all movement at step {centre}" * (
            record["apart_step"] is not None
        )
        title += clause(record["after"])
        panels.append(PairPanel(title, sides[0], sides[1], close_up(steps, centre)))
    whole = mean_losses(run)
    title = titled(run, steps, "pairs of groups whose losses pull against each other")
    if len(panels) < count:
        title += f", {len(panels)} of {count}"
    mixes = {record["group"]: record["labels"] or {"": 1} for record in records if record["kind"] == "group"}
    names = [f"G{group} {next(iter(mix))}".strip() for group, mix in sorted(mixes.items())]
    place = {group - 1: at for at, group in enumerate(sorted(mixes))}
    group_M = np.array([place.get(int(group), -1) for group in found.group_M], np.int64)
    framed = [(place[a - 1], place[b - 1]) for a, b in (record["groups"] for record in pairs)]
    kind = "correlation of loss changes" if clusters.by == "loss" else "cosine of gradients"
    means_GG = between_groups(clusters.similarity_MM, group_M)
    matrix = alignment_block(clusters.similarity_MM, means_GG, group_M, names, framed, kind)
    return pairs_figure(
        panels, steps, whole, title, close_up(steps, rise), matrix if names else [],
        ". ".join(filter(None, (_how(clusters), pictures.words))),
        in_unit("mean loss", loss_unit(run)),
        "none of the pairs that were found is of those asked for" if count else "no opposing pair was found",
    )  # fmt: skip


def _how(clusters: Clusters) -> str:
    """What the numbers over the pairs are."""
    window, held_out = clusters.window.steps_T, clusters.tests.held_out
    said = f"found in {spanned(window)}"
    if clusters.by == "loss":
        return f"{said}. Correlation: of loss changes, in the window's second half"
    said += f". Cosine: between the sides' gradients, +- its standard error over {len(held_out)} held-out checkpoints"
    return f"{said}. Alike: across over within. R: swing left without the pair over that without as many others"


def draw_neighbours(run: Trajectory, clusters: Clusters, near: Near, records: list[dict[str, Any]]) -> Figure:
    """One sample, its nearest allies and opponents, and their losses."""
    from opsig_cli.figures.neighbours import neighbours_page

    pictures, place = Pictures(run), {int(sample): at for at, sample in enumerate(run.samples.tolist())}
    steps, window = run.steps("losses"), clusters.window
    rise = int(window.steps_T[window.rise_row])
    (own,) = (record for record in records if record["kind"] == "sample")
    positions = {"allies": [], "opponents": []}
    captions: dict[int, str] = {}
    for record in records:
        if record["kind"] == "neighbour":
            position = place[record["sample"]]
            positions["allies" if record["relation"] == "ally" else "opponents"].append(position)
            captions[position] = f"{record['similarity']:.2f}"
    series = run.series("losses/loss", np.array([near.position]))[:, 0].astype(np.float64)
    centre = int(steps[int(np.nanargmax(np.abs(np.diff(series)))) + 1]) if len(series) > 1 else rise
    before, after = (predictions_at(run, step) for step in (centre - 1, centre))

    def side(name: str, chosen: list[int]) -> tuple[str, list[Tile], np.ndarray]:
        tiles = [
            pictures.tile(p, pictures.name(before, p), pictures.name(after, p), captions.get(p, "")) for p in chosen
        ]
        mean = (
            run.series("losses/loss", np.array(chosen)).mean(1, dtype=np.float64)
            if chosen
            else np.full(len(steps), np.nan)
        )
        return name, tiles, mean

    measure = "correlation of loss changes" if clusters.by == "loss" else "cosine of gradients"
    whole = mean_losses(run)
    return neighbours_page(
        side(f"sample {own['sample']}", [near.position]), side("nearest allies", positions["allies"]),
        side("nearest opponents", positions["opponents"]), steps, whole, close_up(steps, centre),
        titled(run, steps, f"sample {own['sample']}, its allies and its opponents"),
        f"{own['sentence']}. Under each picture: its {measure} with the sample; predictions around step {centre}, at "
        "which the sample's loss changes most" + (f". {pictures.words}" if pictures.words else ""),
        in_unit("loss", loss_unit(run)),
    )  # fmt: skip


def draw_ends(run: Trajectory, records: list[dict[str, Any]]) -> Figure:
    """What `sharpness --name` found: the samples at both ends of every eigenvector."""
    from opsig_cli.figures.ends import ends_page

    pictures, place = Pictures(run), {int(sample): at for at, sample in enumerate(run.samples.tolist())}
    panels = []
    for record in records:
        before, after = (predictions_at(run, record["step"] + ahead) for ahead in (0, 1))
        sheets = []
        for size, mix, slope, share, samples in zip(
            *(record[key] for key in ("sizes", "labels", "slopes", "shares", "samples")), strict=True
        ):
            positions = [place[sample] for sample in samples[:PAIR_TILES]]
            tiles = [pictures.tile(p, pictures.name(before, p), pictures.name(after, p)) for p in positions]
            sheets.append((f"{describe(mix, size)}: slope {slope:+.2g}, {percent(share)} of eigenvalue", tiles))
        ratio = f", {record['ratio']:.2f} of the threshold" if np.isfinite(record["ratio"]) else ""
        panels.append((f"step {record['step']}, eigenvector {record['rank']}{ratio}", *sheets))
    where = " at the floor of the valley" if any(record["at"] == "floor" for record in records) else ""
    steps = sorted({record["step"] for record in records})
    return ends_page(panels, titled(run, steps, f"the samples at the two ends of leading eigenvectors{where}"))


def predictions_at(run: Trajectory, step: int) -> np.ndarray | None:
    """Every sample's predicted class at a step, (S,), where the file holds any."""
    if not run.has("losses/prediction") or step not in run.steps("losses"):
        return None
    return run.row("losses/prediction", step)


def _curve_rows(run: Trajectory, movers: Movers, stop: int) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Rows to draw, their steps and the whole loss: those mined, or all of the run around a single step."""
    steps = run.steps("losses")
    if len(movers.movement.mean_T) > 2:
        return movers.first, stop, steps[movers.first : stop], movers.movement.mean_T
    whole = mean_losses(run)
    return 0, len(steps), steps, whole


def close_up(steps: np.ndarray, centre: int) -> tuple[int, int]:
    """A close-up of ZOOM steps around the centre, inside the steps there are."""
    first = max(int(steps[0]), min(centre - ZOOM // 2, int(steps[-1]) - ZOOM))
    return first, min(first + ZOOM, int(steps[-1]))
