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
    """A record of each sample whose loss is not finite while the others are, the step, and whether it recovers."""
    if known is None:
        return []
    ids, labels, steps = run.samples, labels_of(run), run.steps("losses")
    return [
        {
            "kind": "not_finite", "trajectory": run.path, "sample": int(ids[position]), "step": int(steps[row]),
            "label": None if labels is None else str(labels[position]), "recovers": passes,
        }
        for position, row, passes in zip(
            known.broken_N.tolist(), known.broken_row_N.tolist(), known.passing_N.tolist(), strict=True
        )
    ]  # fmt: skip


def said(run: Trajectory, known: Coverage, stop: int) -> list[str]:
    """What of the rows before `stop` is not finite or was not measured, in sentences, samples that are not finite
    first."""
    found = []
    inside = known.broken_N[known.broken_row_N < stop]
    if len(inside):
        found.append(f"not finite while other losses are: {named(run, inside, known)}")
    if known.gaps:
        cells = (known.rows if known.diverged is None else known.diverged) * len(known.first_S)
        found.append(
            f"{known.gaps:,} of {cells:,} losses were not measured: a sample without one is taken to have its last"
        )
    return found


def named(run: Trajectory, positions: np.ndarray, known: Coverage | None = None) -> str:
    """The first few samples in these columns by index and label, with the step from which on, or at which, each is not
    finite, where it is `known`."""
    ids, labels, steps = run.samples, labels_of(run), run.steps("losses")
    words = []
    for place, position in enumerate(positions[:NAMED].tolist()):
        label = "" if labels is None else f" (label {labels[position]})"
        when = ""
        if known is not None:
            step, passes = steps[known.broken_row_N[place]], known.passing_N[place]
            when = f" at step {step}, though not at all later ones" if passes else f" from step {step} on"
        words.append(f"sample {ids[position]}{label}{when}")
    return ", ".join(words) + (f" and {len(positions) - NAMED} more" if len(positions) > NAMED else "")


def explained(error: OpsigError, run: Trajectory) -> OpsigError:
    """The error of a run that may be too short, with the samples before it that are not finite."""
    steps = run.steps("losses")
    if isinstance(error, UsageError) or not 0 < len(steps) < SHORT:
        return error
    known = coverage_of(run)
    words = said(run, known, len(steps))[:1] if len(known.broken_N) else []
    return OpsigError("; ".join([*words, str(error)]), error.exit_code)


def too_few(run: Trajectory, count: int) -> str:
    """What to say where `count` samples, fewer than two, are to be grouped."""
    if len(run.samples) < 2:
        return f"{run.path} is a run of one sample, and groups need two at least"
    what = "one sample cannot be grouped" if count else "there are no samples to group"
    return f"{what}. Mine more: opsig mine {run.path} --top 200"


def name_of(names_S: np.ndarray | None, position: int) -> dict[str, str]:
    """The field of a record for a sample's name in the log that it was imported from; none without names."""
    return {} if names_S is None else {"name": str(names_S[position])}


def names_of(run: Trajectory) -> np.ndarray | None:
    """Every sample's name, (S,), where the file has them."""
    return run.read("samples/name") if run.has("samples/name") else None


def labels_of(run: Trajectory) -> np.ndarray | None:
    """Every sample's label, (S,), where the file has them."""
    return run.read("samples/label") if run.has("samples/label") else None
