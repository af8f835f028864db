"""opsig verify"""

from __future__ import annotations

from opsig_cli.commands import options


def verify(run: options.RunArgument, format: options.FormatOption = None) -> None:
    """What is damaged in a trajectory file, and which steps are intact.

    Every attribute, row and dataset is read, and held against its checksum. The last line, on stderr, says whether the
    file is intact; exit code 1 where something is damaged.

    Example: opsig verify run.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers
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
    options.conclude(answers.Answer(integrity.verdict(run, found), answers.command("info", run)), False)


def _shortened(steps: list[int]) -> str | None:
    listed = ", ".join(map(str, steps[:8]))
    return (listed + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")) or None
