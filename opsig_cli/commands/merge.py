"""opsig merge"""

from __future__ import annotations

from typing import Annotated

import typer

from opsig_cli.commands import options


def merge(
    run: options.RunArgument,
    parts: Annotated[list[str], typer.Argument(metavar="PART...", help="Files that --part made.", show_default=False)],
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Take the parts of a run that were measured apart into its file.

    A part may be merged again, and what the run has already stays as it is. Parts of another run, made with other
    settings, or with values that differ from those that are there, are refused.

    Example: opsig merge run.h5 part1.h5 part2.h5
    """
    from opsig_cli import records
    from opsig_cli.studies import answers
    from opsig_cli.studies.parts import merging
    from opsig_cli.trajectory.file import open_trajectory

    with open_trajectory(run, "r+") as trajectory:
        found, missing = merging.merge(trajectory, parts)
    records.write(found, format)
    options.say(missing, quiet)
    taken = sum(record["taken"] for record in found)
    words = (
        f"{taken:,} rows of {len(found)} parts are new in the run" if taken else "the run has all rows of these parts"
    )
    options.conclude(answers.Answer(words, answers.command("info", run)), quiet, run if taken else None)
