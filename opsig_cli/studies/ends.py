"""Who stands at the two ends of the Hessian's leading eigenvectors, in records, sentences and rows. S samples.

Along an eigenvector v the slopes v'g of samples have both signs: what a step along v does for the samples at one end it
undoes for those at the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from opsig_cli.analysis.slopes import End, ends
from opsig_cli.studies.clustering.records import mix_of
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.studies.slopes import Slopes, kept
from opsig_cli.trajectory.file import Trajectory

SHOWN = 20
"""Samples of an end that a record names."""
NAMED = 4
"""Eigenvectors that are named where a person does not say."""


def records(run: Trajectory, steps: Sequence[int], count: int, place: str) -> list[dict[str, Any]]:
    """What the file holds of these checkpoints: one record an eigenvector, with the samples at its two ends."""
    labels_S = run.read("samples/label") if run.has("samples/label") else None
    found = []
    for slopes in (kept(run, step, count, place) for step in steps):
        if slopes is None:
            continue
        for rank, value in enumerate(slopes.values.tolist()):
            both = ends(slopes.slope_SK[:, rank], slopes.curvature_SK[:, rank])
            found.append(_record(run, slopes, rank, value, both, labels_S))
    return found


def _record(
    run: Trajectory, slopes: Slopes, rank: int, value: float, both: tuple[End, End], labels_S: np.ndarray | None
) -> dict[str, Any]:
    mixes = [mix_of(labels_S, end.members) for end in both]
    ratio = value / slopes.threshold if slopes.threshold else float("nan")
    names = [describe(mix, len(end.members)) for mix, end in zip(mixes, both, strict=True)]
    return {
        "kind": "eigenvector",
        "trajectory": run.path,
        "step": slopes.step,
        "at": slopes.place,
        "rank": rank + 1,
        "eigenvalue": value,
        "residual": float(slopes.residuals[rank]),
        "threshold": slopes.threshold,
        "ratio": ratio,
        "sizes": [len(end.members) for end in both],
        "labels": mixes,
        "slopes": [end.slope for end in both],
        "shares": [end.share for end in both],
        "samples": [run.samples[end.members[:SHOWN]].tolist() for end in both],
        "sentence": sentence(rank + 1, ratio, names, both),
    }


def sentence(rank: int, ratio: float, names: Sequence[str], both: tuple[End, End]) -> str:
    """An eigenvector in words."""
    how = f" at {ratio:.2f} of the threshold" if np.isfinite(ratio) else ""
    a, b = both
    return (
        f"eigenvector {rank}{how} sets {names[0]} against {names[1]}: slopes {a.slope:+.2g} and "
        f"{b.slope:+.2g} nats, {a.share:.0%} and {b.share:.0%} of the eigenvalue"
    )


def rows(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of eigenvectors, shortened to what a person reads in a row."""
    return [
        {
            "step": record["step"],
            "vector": record["rank"],
            "of threshold": f"{record['ratio']:.2f}" if np.isfinite(record["ratio"]) else None,
            "one end": describe(record["labels"][0], record["sizes"][0]),
            "against": describe(record["labels"][1], record["sizes"][1]),
            "slopes": " / ".join(f"{slope:+.2g}" for slope in record["slopes"]),
            "of eigenvalue": " / ".join(f"{share:.0%}" for share in record["shares"]),
        }
        for record in found
    ]
