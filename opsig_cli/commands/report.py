"""opsig report"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from opsig_cli.commands import options
from opsig_cli.errors import UsageError


def report(
    run: options.RunArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="PATH", callback=options.check_output, help="Default: the run's name with .html."
        ),
    ] = None,
    by: options.ByOption = None,
    top: options.TopOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Overwrite PATH even if it is no report of opsig's.")
    ] = False,
    branch: Annotated[
        list[str] | None,
        typer.Option("--branch", metavar="BRANCH", help="Branches to list. Default: those in the run's folder."),
    ] = None,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = "torch",
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """One HTML page: which samples move the loss, against which others they pull, and how sure that is.

    The page holds what `opsig cluster` and `opsig mine` print, with pictures, the sharpness where the file has it, and
    what the run's branches showed.
    It loads nothing from anywhere, so that it can be sent and kept.

    Example: opsig report run.h5 -o report.html
    """
    from opsig_cli import records
    from opsig_cli.report import content, page
    from opsig_cli.studies.branching import lineage
    from opsig_cli.studies.clustering import finding, keeping
    from opsig_cli.studies.clustering import records as clustered
    from opsig_cli.trajectory.checking import without_damage
    from opsig_cli.trajectory.file import open_trajectory

    if by not in (None, *finding.BY):
        raise UsageError(f"--by is one of {', '.join(finding.BY)}, not '{by}'")
    path = output or Path(run).with_suffix(".html")
    said: list[str] = []
    damage: list[str] = []

    def warn(text: str) -> None:
        if not text.startswith("device:"):
            said.append(text.removeprefix("note: "))
        options.note(text, quiet)

    keeper = keeping.Keeper()
    with open_trajectory(run) as trajectory:
        page.check_output(path, run, replace)
        progress = partial(options.progress, quiet=quiet)
        branches = (
            lineage.branches_beside(trajectory) if branch is None
            else lineage.branches_among(branch, trajectory, strict=True)
        )  # fmt: skip

        def work():
            said.clear()
            found = keeper.find(
                trajectory, by, top, task, device, backend, warn, progress, partial(options.note, quiet=quiet),
                allow_changed_data=allow_changed_data,
            )  # fmt: skip
            written = clustered.records(trajectory, found.clusters)
            return (
                found,
                written,
                content.gather(found.whole(trajectory), found, written, task, [*damage, *said], branches),
            )

        found, written, shown = without_damage(work, damage.append)
    keeper.keep(trajectory.path)
    options.say(damage, False)
    size = page.write(path, page.render(shown, shlex.join(["opsig", *sys.argv[1:]])))
    for words in found.notes:
        options.note(f"note: {words}", quiet)
    pairs = [record for record in written if record["kind"] == "pair"]
    made = {
        "kind": "report", "trajectory": run, "path": str(path), "pairs": len(pairs),
        "established": len(clustered.established(pairs)), "bytes": size,
    }  # fmt: skip
    records.write([made], format)
