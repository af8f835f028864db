"""Is a trajectory what was written? And a smaller copy of it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.trajectory.disk import sync_folder
from opsig_cli.trajectory.file import Trajectory, create_trajectory, file_errors, open_trajectory
from opsig_cli.trajectory.packing import copy_packed
from opsig_cli.trajectory.redo_log import LOG_SUFFIX
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

    The run is held as by a writer until then. Raises OpsigError where it is damaged, or somebody else writes to it.
    """
    if output != path and (os.path.exists(output) or os.path.exists(output + LOG_SUFFIX)):
        taken = output if os.path.exists(output) else output + LOG_SUFFIX
        raise OpsigError(f"{taken} exists. Remove it first, or choose another name")
    before = os.path.getsize(path) if os.path.exists(path) else 0
    held = open_trajectory(path, "r+")  # nobody else writes, and an interrupted writer's log is applied
    try:
        folder = os.path.dirname(os.path.abspath(held.path if output == path else output))
        with file_errors(output), tempfile.TemporaryDirectory(dir=folder, prefix=".repack-") as temporary:
            new = os.path.join(temporary, "run.h5")
            _write_packed(path, new)
            if output == path:
                held.replace_by(new)
            else:
                os.replace(new, output)
                sync_folder(output)
    finally:
        held.abort()
    return {"trajectory": output, "bytes_before": before, "bytes": os.path.getsize(output)}


def _write_packed(path: str, new: str) -> None:
    with open_trajectory(path) as run:
        bad = [record for record in verify(run) if record["damaged"] or record["reason"]]
        if bad:
            raise OpsigError(f"{path} is damaged in {bad[0]['name']}. See what is intact: opsig verify {path}")
        with create_trajectory(new, run.samples, {"run_id": run.attributes.get("run_id")}) as copy:
            copy_packed(run, copy)
    with open_trajectory(new) as copy:
        if any(record["damaged"] or record["reason"] for record in verify(copy)):
            raise OpsigError(f"the copy of {path} could not be read back. Nothing was changed")
