"""opsig report"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from opsig_cli.commands import options


def report(
    run: options.RunArgument,
    output: options.PageOption = None,
    by: options.ByOption = None,
    top: options.TopOption = None,
    replace: options.ReplacePageOption = False,
    verdict: options.VerdictOption = None,
    pair: options.PairOption = None,
    branch: Annotated[
        list[str] | None,
        typer.Option("--branch", metavar="BRANCH", help="Branches to list. Default: those in the run's folder."),
    ] = None,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
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
    from opsig_cli.report import making
    from opsig_cli.studies import answers, describing
    from opsig_cli.studies.clustering import selecting
    from opsig_cli.trajectory.file import open_trajectory

    path = output or Path(run).with_suffix(".html")
    describing.renew(run, task, partial(options.note, quiet=quiet))
    with open_trajectory(run) as trajectory:
        made = making.make(
            trajectory, path, shlex.join(["opsig", *sys.argv[1:]]), by=by, top=top, branches=branch,
            chosen=selecting.Selection(verdict or (), pair or ()), task=task, device=device, backend=backend,
            allow_changed_data=allow_changed_data, replace=replace, note=partial(options.note, quiet=quiet),
            progress=partial(options.progress, quiet=quiet),
        )  # fmt: skip
        answer = answers.of_clusters(trajectory, made.found, made.records, task)
    made.keeper.keep(run)
    options.say(made.damage, False)
    options.say(made.found.notes, quiet)
    records.write([made.page], format)
    options.conclude(answers.Answer(answer.found, answers.opened(path, answer.next)), quiet, path)
