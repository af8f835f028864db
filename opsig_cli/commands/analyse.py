"""opsig analyse"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from opsig_cli.commands import movers, options
from opsig_cli.errors import OpsigError


def analyse(
    run: options.RunArgument,
    output: options.PageOption = None,
    by: options.ByOption = None,
    top: options.TopOption = None,
    sharpness: Annotated[
        bool, typer.Option("--sharpness/--no-sharpness", help="Measure the sharpness too, where that is affordable.")
    ] = True,
    replace: options.ReplacePageOption = False,
    task: options.TaskOption = None,
    allow_changed_data: options.AllowOption = False,
    device: options.DeviceOption = None,
    threads: options.ThreadsOption = None,
    backend: options.BackendOption = None,
    format: options.FormatOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Everything in one call: who moves, which groups oppose, the sharpness where it is affordable, and the report.

    Does what `opsig mine`, `opsig sharpness`, `opsig cluster` and `opsig report` do, with their defaults. What the file
    holds already is not measured again. Prints the records of what it found: of kind mover, eigenvalue, pair, group and
    member, and one of the report.

    Example: opsig analyse run.h5
    """
    from opsig_cli import records
    from opsig_cli.report import making, page
    from opsig_cli.studies import analysing, answers, describing, door
    from opsig_cli.studies.clustering import tables as shortened
    from opsig_cli.trajectory.file import open_trajectory

    path = output or Path(run).with_suffix(".html")
    note, progress = options.once(quiet), partial(options.progress, quiet=quiet)
    page.check_output(path, run, replace)
    describing.renew(run, task, note)
    moved = door.mine(run)
    options.say(moved.damage, False)
    options.say(moved.notes, quiet)
    with open_trajectory(run) as trajectory:
        steps, words = analysing.affordable_steps(trajectory)
    measured = None
    if sharpness:
        if words:
            note(
                f"note: {words}. Measure it with: {answers.command('sharpness', run, task=task)}"
                if steps
                else f"note: {words}"
            )
        try:
            if steps is not None:
                measured = door.sharpness(
                    run, steps=steps, task=task, device=device, backend=backend, allow_changed_data=allow_changed_data,
                    note=note, progress=progress,
                )  # fmt: skip
        except OpsigError as error:  # the rest of the analysis needs less
            note(f"note: no sharpness: {error}")
    with open_trajectory(run) as trajectory:
        made = making.make(
            trajectory, path, shlex.join(["opsig", *sys.argv[1:]]), by=by, top=top, task=task, device=device,
            backend=backend, allow_changed_data=allow_changed_data, replace=replace, note=note, progress=progress,
        )  # fmt: skip
        answer = answers.of_clusters(trajectory, made.found, made.records, task)
    made.keeper.keep(run)
    options.say(made.damage, False)
    options.say([words for words in made.found.notes if words not in moved.notes], quiet)
    written = [{"kind": "mover"} | record for record in moved]
    written += [{"kind": "eigenvalue"} | record for record in measured or []]
    rows = shortened.pair_table(made.records)
    tables = [
        records.Table(moved.title, movers.mover_rows(moved)[:SHOWN]),
        records.Table(f"{run}: {shortened.headline(made.records)}", rows, shortened.narrow_rows(rows)),
    ]
    if said := shortened.sentence_table(made.records):
        tables.append(records.Table("in words", said))
    records.write([*written, *made.records, made.page], format, tables)
    if measured is not None and measured.answer is not None:
        options.conclude(answers.Answer(measured.answer.found), quiet)
    options.conclude(answers.Answer(answer.found, answers.opened(path, answer.next)), quiet, path)


SHOWN = 10
"""Movers in the table."""
