"""The Hessian's leading eigenvectors as the page shows them: the samples at both ends of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsig_cli.report.samples import Samples, Shown
from opsig_cli.studies import ends
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.slopes import kept, places_kept
from opsig_cli.trajectory.file import Trajectory

VECTORS = 6
"""Eigenvectors that are shown."""
TILES = 10
"""Samples of each end."""


@dataclass(frozen=True)
class Vector:
    """An eigenvector; `record` is what `sharpness --name` prints. Of each end: its name, slope, part, and samples."""

    record: Mapping[str, Any]
    sides: list[tuple[str, float, float, list[Shown]]]


def show_vectors(run: Trajectory, rise: int, shown: Samples) -> list[Vector]:
    """The eigenvectors whose ends the file holds, at the step nearest to the largest rise; none where it holds none.

    `shown`: notes which samples they are.
    """
    places = places_kept(run)
    if not places:
        return []
    step = min(places, key=lambda step: (abs(step - rise), step))
    held = kept(run, step, 1, places[step], every=True)
    assert held is not None
    count = min(VECTORS, len(held.values))
    samples = shown.around(step, step + 1)
    place = {int(sample): position for position, sample in enumerate(run.samples.tolist())}
    found = []
    for record in ends.records(run, [step], count, places[step]):
        sides = [
            (describe(mix, size), slope, share, samples.show([place[sample] for sample in chosen[:TILES]]))
            for size, mix, slope, share, chosen in zip(
                *(record[key] for key in ("sizes", "labels", "slopes", "shares", "samples")), strict=True
            )
        ]
        found.append(Vector(record, sides))
    return found
