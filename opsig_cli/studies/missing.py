"""Samples that are not finite while the others are, and gaps: in words, and as records. S samples."""

from __future__ import annotations

from typing import Any

import numpy as np

from opsig_cli.analysis.coverage import Coverage
from opsig_cli.errors import OpsigError, UsageError
from opsig_cli.studies.filled import coverage_of
from opsig_cli.trajectory.file import Trajectory

NAMED = 5
"""Samples that are named; of more the number is said."""
SHORT = 64
"""Steps up to which a run may be too short because it stopped at a sample that is not finite."""


def not_finite(run: Trajectory, known: Coverage | None) -> list[dict[str, Any]]:
    """A record of each sample whose loss is not finite while the others are, and the step from which on."""
    if known is None:
        return []
    ids, labels, steps = run.samples, labels_of(run), run.steps("losses")
    return [
        {
            "kind": "not_finite", "trajectory": run.path, "sample": int(ids[position]), "step": int(steps[row]),
            "label": None if labels is None else str(labels[position]),
        }
        for position, row in zip(known.broken_N.tolist(), known.broken_row_N.tolist(), strict=True)
    ]  # fmt: skip


def said(run: Trajectory, known: Coverage, stop: int) -> list[str]:
    """What of the rows before `stop` is not finite or was not measured, in sentences, samples that are not finite
    first."""
    found = []
    inside = known.broken_N[known.broken_row_N < stop]
    if len(inside):
        found.append(f"not finite while other losses are: {named(run, inside, known.broken_row_N)}")
    if known.gaps:
        cells = (known.rows if known.diverged is None else known.diverged) * len(known.first_S)
        found.append(
            f"{known.gaps:,} of {cells:,} losses were not measured: a sample without one is taken to have its last"
        )
    return found


def named(run: Trajectory, positions: np.ndarray, rows: np.ndarray | None = None) -> str:
    """The first few samples in these columns by index and label, with the step of each one's row where given."""
    ids, labels, steps = run.samples, labels_of(run), run.steps("losses")
    words = []
    for place, position in enumerate(positions[:NAMED].tolist()):
        label = "" if labels is None else f" (label {labels[position]})"
        words.append(f"sample {ids[position]}{label}" + ("" if rows is None else f" from step {steps[rows[place]]} on"))
    return ", ".join(words) + (f" and {len(positions) - NAMED} more" if len(positions) > NAMED else "")


def explained(error: OpsigError, run: Trajectory) -> OpsigError:
    """The error of a run that may be too short, with the samples before it that are not finite."""
    steps = run.steps("losses")
    if isinstance(error, UsageError) or not 0 < len(steps) < SHORT:
        return error
    known = coverage_of(run)
    words = said(run, known, len(steps))[:1] if len(known.broken_N) else []
    return OpsigError("; ".join([*words, str(error)]), error.exit_code)


def labels_of(run: Trajectory) -> np.ndarray | None:
    """Every sample's label, (S,), where the file has them."""
    return run.read("samples/label") if run.has("samples/label") else None
