"""What stands in the report, gathered from a trajectory and from what `cluster` found."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsig_cli.report import branches as branched
from opsig_cli.report import run_facts, tables, words
from opsig_cli.report.losses import loss_lines
from opsig_cli.report.pairs import show_pair
from opsig_cli.report.run_facts import Curvature
from opsig_cli.report.samples import Samples
from opsig_cli.report.vectors import show_vectors
from opsig_cli.studies import comparing, missing
from opsig_cli.studies.clustering import explaining
from opsig_cli.studies.clustering.finding import Found
from opsig_cli.studies.clustering.records import by_strength, established
from opsig_cli.studies.clustering.selecting import Selection
from opsig_cli.studies.numbers import in_unit, loss_unit
from opsig_cli.trajectory.file import Trajectory

PAIRS, TEXT_PAIRS = 8, 100
"""Pairs that are shown with their samples, and the same of text, which takes little room; all are in the overview."""
OPENING = 6
"""Established pairs with which the page opens."""


def gather(
    run: Trajectory, found: Found, records: Sequence[dict[str, Any]], task: str | None, warnings: Sequence[str] = (),
    branches: Sequence[Mapping[str, Any]] = (), chosen: Selection | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that the template names, from the groups found and the records `cluster` would print of them.

    `chosen`: the pairs to list and to show, all by default; the numbers under the opening are of all.
    `branches`: of the run, as `lineage` found them; `warnings`: what was said while the task was opened.
    """
    clusters, window = found.clusters, found.clusters.window
    pairs = by_strength([record for record in records if record["kind"] == "pair"])
    groups = [record for record in records if record["kind"] == "group"]
    held = established(pairs)
    series = comparing.series_of(run)
    loss = series["loss"]
    rise, previous = (int(window.steps_T[row]) for row in (window.rise_row, window.rise_row - 1))
    means = dict(zip(loss.steps.tolist(), loss.values.tolist(), strict=True))
    samples = Samples(run, previous, rise)
    explained = explaining.explain(run, clusters, rise)
    curvature = run_facts.curvature_of(run, rise)
    unit = loss_unit(run)
    most = TEXT_PAIRS if run.has("samples/text") else PAIRS
    listed = by_strength((chosen or Selection()).pairs(records))
    shown = [show_pair(run, clusters, samples, loss, pair) for pair in listed[:most]]
    vectors, alone = show_vectors(run, rise, samples), tables.alone(clusters, samples, groups)
    movers = tables.movers(run, found, samples)
    members = tables.members(run, window, records, samples)
    lines, axis = loss_lines(run, list(samples.shown_at.values()))
    for row in (*members, *movers):
        row["losses"] = lines[samples.shown_at[row["sample"]]]
    has = {
        "checkpoints": bool(len(run.steps("checkpoints"))), "prediction": run.has("losses/prediction"),
        "label": run.has("samples/label"), "picture": run.has("samples/thumbnail") or run.has("samples/text"),
    }  # fmt: skip
    notes = [*warnings, *(note for note in found.notes if note != found.movers.note)]
    attributes = run.attributes
    return {
        "name": Path(run.path).name,
        "broken": missing.not_finite(run, found.movers.known),
        "answer": words.answer(pairs, groups, len(clusters.position)),
        "opening": [pair for pair in shown if pair.established][:OPENING],
        "unit": unit,
        "truth": tables.truth(run, found),
        "exported": tables.exported(run, window, records),
        "line_axis": axis,
        "rise": words.rise_sentence(
            rise, means[previous], means[rise], _movement(explained, held), len(held),
            run_facts.larger_rise(loss, rise), unit,
        ),
        "rise_step": rise,
        "note": found.movers.note,
        "tiles": _tiles(pairs, held, explained, rise, means[rise] - means[previous], curvature, unit),
        "facts": [*branched.origin(run), *run_facts.facts(run, series)],
        "branches": branched.rows(branches),
        "branch_count": len(branches),
        "loss": run_facts.loss_chart(loss, window, rise, in_unit("loss", unit)),
        "curvature": curvature,
        "vectors": vectors,
        "contributions": tables.contributions(explained, pairs),
        "pairs": shown,
        "linked": [pair.record["pair"] for pair in shown],
        "overview": listed,
        "left_out": len(pairs) - len(listed),
        "alone": alone,
        "alone_count": sum(group["pair"] is None for group in groups),
        "movers": movers,
        "matrix": tables.matrix(clusters, groups) if groups else None,
        "members": members,
        "limits": words.limits(pairs, len(held), clusters.by, has, notes, attributes.get("state")),
        "commands": words.commands(
            run.path, clusters.by, task, attributes.get("command"), pairs[0]["pair"] if pairs else None,
            has["checkpoints"],
        ),
        "by": clusters.by,
        "has": has,
        "w": words,
    }  # fmt: skip


def _movement(explained: Sequence[Mapping[str, Any]], held: Sequence[Mapping[str, Any]]) -> float | None:
    """The part of all movement at the rise that members of the established pairs carry, each group once."""
    groups = {group for pair in held for group in pair["groups"]}
    parts = [part["movement"] for part in explained if part["group"] in groups]
    return None if not parts or any(part is None or math.isnan(part) for part in parts) else sum(parts)


def _tiles(
    pairs: Sequence[Any], held: Sequence[Any], explained: Sequence[Mapping[str, Any]], rise: int, change: float,
    curvature: Curvature | None, unit: str,
) -> list[tuple[str, str, str]]:  # fmt: skip
    """The few numbers under the answer: what, how much, and of what."""
    movement = _movement(explained, held)
    tiles = [
        ("Established pairs", f"{len(held)} of {len(pairs)}" if pairs else "none", "of those that were found"),
        ("Their share of movement", words.percent(movement) if held else "\N{EN DASH}", f"at step {rise}, up or down"),
        ("Largest rise of the loss" if change > 0 else "Smallest fall of the loss", words.nats(change, sign=True),
         f"{unit + ', ' if unit else ''}at step {rise}"),
    ]  # fmt: skip
    if curvature is not None and curvature.ratio is not None:
        tiles.append(
            (
                "Sharpness, at most",
                f"{curvature.ratio:.2f} \N{MULTIPLICATION SIGN}",
                "the stability threshold" + (", at the floor" if curvature.floor else ""),
            )
        )
    else:
        tiles.append(("Sharpness", "\N{EN DASH}", "no threshold known" if curvature else "not in this file"))
    return tiles
