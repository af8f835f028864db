"""A branch's file: a trajectory like any other that begins at the fork and says where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opsig_cli.backends import Session
from opsig_cli.records import plain
from opsig_cli.studies import training
from opsig_cli.studies.branching.changes import Change
from opsig_cli.studies.branching.futures import Plan
from opsig_cli.studies.branching.lineage import identity
from opsig_cli.tasks import TaskSpec
from opsig_cli.trajectory.file import Trajectory, open_trajectory
from opsig_cli.trajectory.recorder import Recorder

TAKEN_OVER = tuple(f"samples/{name}" for name in ("label", "target", "thumbnail", "text", "truth", "feature"))
"""What the samples are, which every command reads in the branch's file alone; of the past nothing is copied."""


def recorder(
    path: str, run: Trajectory, session: Session, spec: TaskSpec, change: Change, plan: Plan, replace: bool
) -> Recorder:
    """A new file with its provenance, what the samples are, their weights, and the checkpoint of the fork."""
    origin = {
        "task": str(spec), "task_source": spec.source, "task_sha256": spec.digest, "parent": identity(run),
        "parent_path": os.path.abspath(run.path), "from_step": plan.start.step, "change": change.words,
        "change_json": change.stored_form(), "loss_unit": run.attributes.get("loss_unit"),
    }  # fmt: skip
    made = Recorder(
        path, session.samples, layout=session.layout, replace=replace,
        attributes=training.provenance(plan.settings, session) | origin,
    )  # fmt: skip
    order = np.argsort(run.samples)
    for name in TAKEN_OVER:
        if run.has(name):
            made.run.write(name, run.read(name)[order])
    if run.has("class_name"):
        made.run.write("class_name", run.read("class_name"))
    if plan.weights is not None:
        made.run.write("samples/weight", plan.weights)
    made.record(plan.start.step, state=plan.start)
    return made


def keep_effects(path: str, records: Sequence[Mapping[str, Any]]) -> None:
    """Add to a branch's file what the command prints of it."""
    with open_trajectory(path, "r+") as file:
        file.set_attributes(effects_json=[{key: plain(value) for key, value in r.items()} for r in records])
