"""Is a trajectory what was written? And a smaller copy of it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from opsig_cli.errors import OpsigError
from opsig_cli.settings import Settings
from opsig_cli.trajectory import external, sightings
from opsig_cli.trajectory.disk import sync_folder
from opsig_cli.trajectory.file import Trajectory, create_trajectory, file_errors, open_trajectory
from opsig_cli.trajectory.packing import copy_packed
from opsig_cli.trajectory.redo_log import LOG_SUFFIX
from opsig_cli.trajectory.schema import ROW_GROUPS, field_of
from opsig_cli.trajectory.states import read_layout


def verify(run: Trajectory, outside: bool = True) -> list[dict[str, Any]]:
    """One record for the attributes, each row group, the sightings and each whole dataset: its rows, those that are
    intact, and the steps (of sightings and datasets the places) that are damaged. With `outside` also one for the files
    that the run refers to, which are read once through."""
    records = [_attributes(run)]
    if outside and run.has(external.EXTENTS):
        changed, why = external.changed_steps(run)
        records.append(_record(run, "checkpoints/external", len(run.steps("checkpoints")), changed, why))
    for group in ROW_GROUPS:
        if not run.has(f"{group}/step"):
            continue
        recorded = sorted(run._rows(group).steps)
        damaged, reason = run.damaged_steps(group), None
        if not run.has(f"{group}/checksum"):
            reason = "there are no checksums, so that damage does not show"
        elif not damaged:
            try:
                run.steps(group)
            except OpsigError as error:
                damaged, reason = recorded, str(error)
        records.append(_record(run, group, len(recorded), damaged, reason or ("checksum" if damaged else None)))
    if sightings.count(run):
        damaged = sightings.damaged_places(run).tolist()
        reason = "checksum" if damaged else None
        if not run.has(f"{sightings.GROUP}/checksum"):
            reason = "there are no checksums, so that damage does not show"
        elif not damaged:
            try:
                for _ in sightings.blocks(run):
                    pass
            except OpsigError as error:
                reason = str(error)
        records.append(_record(run, sightings.GROUP, sightings.count(run), damaged, reason))
    for name in run.names():
        if field_of(name).dims[0] in ("step", "sighting"):
            continue
        rows = run.shape(name)[0]
        try:
            run.read(name)
            if name == "layout/name":
                read_layout(run)
            records.append(_record(run, name, rows, [], None))
        except OpsigError as error:
            records.append(_record(run, name, rows, list(range(rows)), str(error)))
    return records


def verdict(path: str, records: list[dict[str, Any]]) -> str:
    """What `verify` found in one sentence. Raises OpsigError where something is damaged."""
    bad = [record for record in records if record["damaged"] or record["reason"]]
    if bad:
        names = ", ".join(
            f"{r['name']} ({len(r['damaged'])} of {r['rows']} rows)" if r["damaged"] else f"{r['name']} ({r['reason']})"
            for r in bad
        )
        raise OpsigError(f"{path} is damaged in {names}. Its other steps can be used")
    rows = sum(record["rows"] for record in records)
    return f"{path} is intact: {rows:,} rows in {len(records):,} parts are what was written"


def _attributes(run: Trajectory) -> dict[str, Any]:
    """Whether the root's attributes, and those of the schema's datasets, can be read and are what they must be."""
    count, reason = 0, None
    try:
        count = len(run.attributes)
        if "settings_json" in run.attributes:
            Settings.stored(run.attributes, run.path)
        for name in run.names():
            with run.damage(f"an attribute of {name}"):
                dict(run._file[name].attrs.items())
    except OpsigError as error:
        reason = str(error)
    return _record(run, "attributes", count, [], reason)


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
            _write_packed(path, new, output)
            if output == path:
                held.replace_by(new)
            else:
                os.replace(new, output)
                sync_folder(output)
    finally:
        held.abort()
    return {"trajectory": output, "bytes_before": before, "bytes": os.path.getsize(output)}


def _write_packed(path: str, new: str, output: str) -> None:
    with open_trajectory(path) as run:
        bad = [record for record in verify(run, outside=False) if record["damaged"] or record["reason"]]
        if bad:
            raise OpsigError(f"{path} is damaged in {bad[0]['name']}. See what is intact: opsig verify {path}")
        with create_trajectory(new, run.samples, {"run_id": run.attributes.get("run_id")}) as copy:
            copy_packed(run, copy)
            if copy.has(external.EXTENTS):
                external.rebase(copy, run.path, output)
    with open_trajectory(new) as copy:
        if any(record["damaged"] or record["reason"] for record in verify(copy, outside=False)):
            raise OpsigError(f"the copy of {path} could not be read back. Nothing was changed")
