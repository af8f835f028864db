"""What records that another command printed name: samples, and members of groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from opsig_cli.errors import OpsigError
from opsig_cli.studies import mining
from opsig_cli.studies.clustering.sentences import describe
from opsig_cli.trajectory.file import Trajectory


def samples_of(records: Sequence[dict[str, Any]]) -> list[int]:
    """The samples that records name, each once, in order; those that are not finite have nothing to measure."""
    named = (r["sample"] for r in records if isinstance(r.get("sample"), int) and r.get("kind") != "not_finite")
    return list(dict.fromkeys(named))


def chosen(run: Trajectory, records: Sequence[dict[str, Any]], random: int, seed: int) -> dict[str, np.ndarray]:
    """Positions of the samples to measure by the name of their set: those of records, random ones, or all."""
    found = {}
    ids = samples_of(records)
    if records and not ids:
        raise OpsigError(
            "records on stdin name no samples. Pipe those that mine prints, or cluster's members: "
            "jq -c 'select(.kind==\"member\")'"
        )
    if ids:
        found["chosen"] = mining.positions_of(run, ids)
    if random:
        rest = np.setdiff1d(np.arange(len(run.samples)), found.get("chosen", []))
        found["random"] = np.sort(np.random.default_rng(seed).choice(rest, min(random, len(rest)), replace=False))
    return found or {"all": np.arange(len(run.samples))}


def names_of(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the groups that members in the records name are called everywhere: by those that they were found with."""
    labels: dict[int, dict[int, str | None]] = {}
    for record in records:
        if isinstance(record.get("sample"), int) and isinstance(record.get("group"), int) and record.get("mined", True):
            labels.setdefault(record["group"], {})[record["sample"]] = record.get("label")
    named = {}
    for group, found in labels.items():
        mix = dict(Counter(str(label) for label in found.values() if label is not None).most_common())
        named[f"G{group}"] = f"G{group}: {describe(mix, len(found))}"
    return named


def groups_of(run: Trajectory, records: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Positions of the groups whose members the records name."""
    members: dict[str, list[int]] = {}
    for record in records:
        if isinstance(record.get("sample"), int) and record.get("group") is not None:
            members.setdefault(f"G{record['group']}", []).append(record["sample"])
    if records and not members:
        raise OpsigError("records on stdin name no members of groups. Pipe those that opsig cluster prints")
    return {name: mining.positions_of(run, list(dict.fromkeys(ids))) for name, ids in members.items()}
