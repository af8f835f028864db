"""opsig verify"""

from __future__ import annotations

from opsig_cli.commands import options
from opsig_cli.errors import OpsigError


def verify(run: options.RunArgument, format: options.FormatOption = None) -> None:
    """What is damaged in a trajectory file, and which steps are intact.

    Every row and every dataset is read and held against its checksum. Exit code 1 where something is damaged.

    Example: opsig verify run.h5
    """
    from opsig_cli import records
    from opsig_cli.trajectory import integrity
    from opsig_cli.trajectory.file import open_trajectory

    with open_trajectory(run) as trajectory:
        found = integrity.verify(trajectory)
    shown = [
        {
            "name": r["name"],
            "rows": r["rows"],
            "intact": r["intact"],
            "damaged": _shortened(r["damaged"]),
        }
        for r in found
    ]
    records.write(found, format, [records.Table(run, shown)])
    bad = [record for record in found if record["damaged"] or record["reason"]]
    if bad:
        names = ", ".join(f"{r['name']} ({len(r['damaged'])} of {r['rows']} rows)" for r in bad)
        raise OpsigError(f"{run} is damaged in {names}. Its other steps can be used")


def _shortened(steps: list[int]) -> str | None:
    listed = ", ".join(map(str, steps[:8]))
    return (listed + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")) or None
