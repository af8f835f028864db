"""Is a trajectory what was written? And a smaller copy of it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.file import Trajectory, create_trajectory, open_trajectory
from opsig_cli.trajectory.packing import copy_packed
from opsig_cli.trajectory.schema import FIELDS, ROW_GROUPS


def verify(run: Trajectory) -> list[dict[str, Any]]:
    """One record for each row group and each whole dataset: its rows, those that are intact, and what is damaged."""
    records = []
    for group in ROW_GROUPS:
        if not run.has(f"{group}/step"):
            continue
        steps = run.steps(group).tolist()
        try:
            damaged, reason = run.damaged_steps(group), None
        except OpsigError as error:
            damaged, reason = steps, str(error)
        records.append(_record(run, group, len(steps), damaged, reason or ("checksum" if damaged else None)))
    for name in run.names():
        if FIELDS[name].dims[0] == "step":
            continue
        rows = run.shape(name)[0]
        try:
            run.read(name)
            records.append(_record(run, name, rows, [], None))
        except OpsigError as error:
            records.append(_record(run, name, rows, list(range(rows)), str(error)))
    return records


def _record(run: Trajectory, name: str, rows: int, damaged: list[int], reason: str | None) -> dict[str, Any]:
    return {
        "trajectory": run.path,
        "name": name,
        "rows": rows,
        "intact": rows - len(damaged),
        "damaged": damaged,
        "reason": reason,
    }


def repack(path: str, output: str) -> dict[str, Any]:
    """Write a compressed copy of a finished run, and put it in place when it is whole; `output` may be `path`.

    Raises OpsigError where the run is damaged, or still written.
    """
    if output != path and os.path.exists(output):
        raise OpsigError(f"{output} exists. Remove it first, or choose another name")
    before = os.path.getsize(path) if os.path.exists(path) else 0
    open_trajectory(path, "r+").close()  # nobody else writes, and an interrupted writer's log is applied
    folder = os.path.dirname(os.path.abspath(output))
    with open_trajectory(path) as run, tempfile.TemporaryDirectory(dir=folder, prefix=".repack-") as temporary:
        bad = [record for record in verify(run) if record["damaged"] or record["reason"]]
        if bad:
            raise OpsigError(f"{path} is damaged in {bad[0]['name']}. See what is intact: opsig verify {path}")
        new = os.path.join(temporary, "run.h5")
        with create_trajectory(new, run.samples) as copy:
            copy_packed(run, copy)
        with open_trajectory(new) as copy:
            if any(record["damaged"] or record["reason"] for record in verify(copy)):
                raise OpsigError(f"the copy of {path} could not be read back. Nothing was changed")
        os.replace(new, output)
    return {"trajectory": output, "bytes_before": before, "bytes": os.path.getsize(output)}
